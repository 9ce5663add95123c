"""Where the parameters of a matrix go: the parameters whose product is an entry of its dense form."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from surm_jax.structured.base import StructuredMatrix


class Origins(NamedTuple):
    """`M[i, j] = scale[i, j] * product over arrays a of a.flat[places[a][i, j]]`.

    Attributes:
        scale: (in, out); 0 where the entry is zero for all parameters.
        places: For each array (in, out), the place in the flattened array, or -1 where none of its numbers is in the
            entry.
    """

    scale: Float[np.ndarray, "in out"]
    places: dict[str, Int[np.ndarray, "in out"]]


def origins(matrix: StructuredMatrix) -> Origins | None:
    """Return for each entry the parameters whose product it is, and a constant; None if some entries are sums.

    This works for any family: multiplying number k of an array by k + 2 multiplies by k + 2 the entries that contain
    it, which shows where they are. Other random numbers then confirm the result. The values in the matrix do not
    matter. The matrix is formed once for each of its arrays and twice more, in float64.

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
    # Away from 0, and without a pattern in which the terms of a sum could agree with a product.
    base = {name: rng.uniform(1, 2, leaf.shape) for name, leaf in matrix.arrays().items()}
    other = {name: rng.uniform(1, 2, leaf.shape) for name, leaf in base.items()}
    with jax.enable_x64(True):
        dense = jax.jit(lambda arrays: matrix.with_arrays(**arrays).to_dense())
        start, check = np.asarray(dense(base)), np.asarray(dense(other))
        moved = {
            name: np.asarray(dense({**base, name: leaf * (np.arange(leaf.size) + 2.0).reshape(leaf.shape)}))
            for name, leaf in base.items()
        }
    # What is not zero by structure is made of numbers of about 1; what is may be a rounding error of a transform.
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
    """Return the numbers of the array at these places; 1 at -1."""
    return np.append(leaf, 1.0)[places]
