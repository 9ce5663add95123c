"""The parameters in each entry of a dense form, for matrices whose entries are products of parameters."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from surm_jax.structured.base import StructuredMatrix


class Origins(NamedTuple):
    """The factors of each entry: `M[i, j] = scale[i, j] * product over arrays a of a.flat[places[a][i, j]]`.

    Attributes:
        scale: (in, out), the constant factors; 0 where the entry is zero for all parameters.
        places: For each array, by name, the indices of its parameters in the flattened array, (in, out); -1 where the
            entry has no factor from this array.
    """

    scale: Float[np.ndarray, "in out"]
    places: dict[str, Int[np.ndarray, "in out"]]


def origins(matrix: StructuredMatrix) -> Origins | None:
    """Return the parameters and the constant whose product is each entry, or None if some entries are sums.

    This works for any family, and the values in the matrix do not matter. Multiplying number k of an array by k + 2
    multiplies by k + 2 the entries that contain it, which identifies them. A second set of random numbers confirms the
    result. The dense form is computed in float64, once for each array and twice more.

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
    # Random numbers away from 0: with them a sum cannot look like a product by coincidence.
    base = {name: rng.uniform(1, 2, leaf.shape) for name, leaf in matrix.arrays().items()}
    other = {name: rng.uniform(1, 2, leaf.shape) for name, leaf in base.items()}
    with jax.enable_x64(True):
        dense = jax.jit(lambda arrays: matrix.with_arrays(**arrays).to_dense())
        start, check = np.asarray(dense(base)), np.asarray(dense(other))
        moved = {
            name: np.asarray(dense({**base, name: leaf * (np.arange(leaf.size) + 2.0).reshape(leaf.shape)}))
            for name, leaf in base.items()
        }
    # Entries that are zero by structure may hold rounding errors of a transform. All others have a size of about 1.
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
    """Return the entries of the flattened array at these places, and 1 where the place is -1."""
    return np.append(leaf, 1.0)[places]
