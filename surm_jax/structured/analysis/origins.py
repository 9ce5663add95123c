"""Analysis of structured matrices whose entries are products of parameters: which parameters each entry contains."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from surm_jax.structured.base import StructuredMatrix


class Origins(NamedTuple):
    """The factors of each entry of a structured matrix of shape (in, out).

    The entry (i, j) is the product of the constant `scale[i, j]` and of at most one parameter of each array.

    Attributes:
        scale: The constants, an array of shape (in, out). A constant is 0 if the entry is zero for all values of the
            parameters.
        places: A dictionary from the name of each array of parameters to an integer array of shape (in, out). Its value
            at (i, j) is the index, in the flattened array, of the parameter that is a factor of the entry (i, j). It is
            -1 if no parameter of this array is a factor of the entry.
    """

    scale: Float[np.ndarray, "in out"]
    places: dict[str, Int[np.ndarray, "in out"]]


def origins(matrix: StructuredMatrix) -> Origins | None:
    """Return, for each entry, the parameters whose product it is. Return None if some entries are sums of products.

    It works for any family and any values of the parameters. The arrays are filled with random values. Then each array
    in turn is multiplied entry by entry by k + 2, where k is the index of the entry. If an entry of the dense matrix
    becomes k + 2 times as large, parameter k is one of its factors. A second set of random values confirms the result.

    In the example, the entry (1, 0) of the 2 x 3 skew-circulant matrix is -1 times the parameter `v[2]`.

    >>> import jax.numpy as jnp
    >>> from surm_jax.structured import SkewCirculant
    >>> scale, places = origins(SkewCirculant(jnp.zeros(3), shape=(2, 3)))
    >>> scale.round()
    array([[ 1.,  1.,  1.],
           [-1.,  1.,  1.]])
    >>> places["v"]
    array([[0, 1, 2],
           [2, 0, 1]])
    """
    rng = np.random.default_rng(0)
    # Random values between 1 and 2. With them, a sum practically never looks like a product by coincidence.
    base = {name: rng.uniform(1, 2, leaf.shape) for name, leaf in matrix.arrays().items()}
    other = {name: rng.uniform(1, 2, leaf.shape) for name, leaf in base.items()}
    with jax.enable_x64(True):
        dense = jax.jit(lambda arrays: matrix.with_arrays(**arrays).to_dense())
        start, check = np.asarray(dense(base)), np.asarray(dense(other))
        moved = {
            name: np.asarray(dense({**base, name: leaf * (np.arange(leaf.size) + 2.0).reshape(leaf.shape)}))
            for name, leaf in base.items()
        }
    # Entries that are zero for all parameters may hold rounding errors of an FFT. All others are of order 1.
    zero = np.abs(start) <= 1e-12 * np.max(np.abs(start))
    scale, places, expected = np.where(zero, 0, start), {}, np.ones_like(start)
    for name, leaf in base.items():
        multiple = np.where(zero, 1, moved[name] / np.where(zero, 1, start))
        places[name] = np.rint(np.clip(multiple - 2, -1, leaf.size - 1)).astype(int)
        scale = scale / _pick(leaf, places[name])
        expected = expected * _pick(other[name], places[name])
    largest = np.max(np.abs(check))
    return Origins(scale, places) if np.allclose(check, scale * expected, rtol=1e-9, atol=1e-9 * largest) else None


def _pick(leaf: np.ndarray, places: Int[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
    """Return the entries of the flattened `leaf` at the indices `places`, and 1 where the index is -1."""
    return np.append(leaf, 1.0)[places]
