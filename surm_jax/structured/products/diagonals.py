"""Dense forms and spectra of matrices that are constant along each diagonal, such as Toeplitz and circulant ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float


def from_diagonals(t: Float[Array, " diagonals"], shape: tuple[int, int]) -> Float[Array, "in out"]:
    """Return the Toeplitz matrix of the given shape (m, n) whose diagonals have the values `t`.

    `t` has m + n - 1 values, for the diagonals from the bottom left corner to the top right corner. The entry (i, j) of
    the matrix is `t[j - i + m - 1]`. Each row is computed as one slice of `t`. Indexing `t` for each entry would be a
    gather, whose derivative is a slow scatter.

    >>> from_diagonals(jnp.arange(4), (2, 3))
    Array([[1, 2, 3],
           [0, 1, 2]], dtype=int32)
    """
    m, n = shape
    return jax.vmap(lambda start: jax.lax.dynamic_slice(t, (start,), (n,)))(jnp.arange(m)[::-1])


def from_wrapped_diagonals(v: Float[Array, " N"], shape: tuple[int, int], f: float = 1.0) -> Float[Array, "in out"]:
    """Return the top left (m, n) block of the transpose of the f-circulant matrix `Z_f(v)` of arXiv 2406.17740.

    `Z_f(v)` is N x N, N = max(m, n), with the first column v. The entry (i, j) of the result is `v[j - i]` on and above
    the main diagonal, and `f * v[N + j - i]` below it. f = 1 gives circulant, and f = -1 skew-circulant matrices.

    >>> from_wrapped_diagonals(jnp.array([1.0, 2.0, 3.0]), (2, 3), f=-1.0)
    Array([[ 1.,  2.,  3.],
           [-3.,  1.,  2.]], dtype=float32)
    """
    m, n = shape
    wrapped = v[max(shape) - m + 1 :]
    return from_diagonals(jnp.concatenate([wrapped if f == 1 else f * wrapped, v[:n]]), shape)


def wrapped_spectrum(
    v: Float[ArrayLike, " n"], shape: tuple[int, int], f: float = 1.0
) -> Complex[np.ndarray, "n"] | None:
    """Return the eigenvalues of the f-circulant matrix `Z_f(v)`, which are also those of its transpose.

    They are the values of the polynomial with the coefficients v at the n numbers whose nth power is f. The function
    returns None if the matrix is not square, or if f is neither 1 nor -1. An f-circulant matrix with another f is not
    normal, so its singular values are not the absolute values of its eigenvalues.
    """
    m, n = shape
    if m != n or abs(f) != 1:
        return None
    v = np.asarray(v)
    return np.fft.fft(v if f == 1 else v * np.exp(-1j * np.pi * np.arange(n) / n))
