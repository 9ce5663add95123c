"""Dense forms of matrices that are constant along their diagonals."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def from_diagonals(t: Float[Array, " diagonals"], shape: tuple[int, int]) -> Float[Array, "in out"]:
    """Return the m x n matrix with `t[j - i + m - 1]` at (i, j): `t` lists its diagonals from bottom left to top right.

    Row i is one slice of `t`. Indexing each entry would be a gather, whose derivative is a slow scatter.

    >>> from_diagonals(jnp.arange(4), (2, 3))
    Array([[1, 2, 3],
           [0, 1, 2]], dtype=int32)
    """
    m, n = shape
    return jax.vmap(lambda start: jax.lax.dynamic_slice(t, (start,), (n,)))(jnp.arange(m)[::-1])


def from_wrapped_diagonals(v: Float[Array, " N"], shape: tuple[int, int], f: float = 1.0) -> Float[Array, "in out"]:
    """Return the top left m x n block of the transposed f-circulant `Z_f(v)^T`, N = max(m, n).

    Entry (i, j) is `v[j - i]` if j >= i, and `f * v[N + j - i]` below the diagonal.

    >>> from_wrapped_diagonals(jnp.array([1.0, 2.0, 3.0]), (2, 3), f=-1.0)
    Array([[ 1.,  2.,  3.],
           [-3.,  1.,  2.]], dtype=float32)
    """
    m, n = shape
    wrapped = v[max(shape) - m + 1 :]
    return from_diagonals(jnp.concatenate([wrapped if f == 1 else f * wrapped, v[:n]]), shape)
