"""Circular and skew-circular convolution by FFT. On a mesh, each device transforms only its own part of the batch.

The convolutions run inside `surm_jax.devices.batch.batch_local`. Without it, XLA would gather all activations on every
device before an FFT.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, DTypeLike, Float

from surm_jax.devices.batch import batch_local
from surm_jax.errors import UserError


def circular_convolve(x: Float[Array, "*batch m"], c: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    """Return the circular convolution of `x` and `c` over the last axis, `y_j = sum_i x_i c_{(j-i) mod n}`.

    It is computed as `F y = F x * F c` with the discrete Fourier transform F. The cost is O(n log n) per row: two real
    FFTs of length n for each row of `x`, and one for `c`. Reverse mode stores the spectra of `x` and `c`. With
    `jax.checkpoint` around the call, it stores only `x` and `c`.

    Args:
        x: Array of shape (..., m) with m <= n. It is padded with zeros to length n.
        c: Array of shape (n,), with the same dtype as `x`.

    Returns:
        An array of shape (..., n) in the dtype of `x`, which is float32 or float64.

    Raises:
        UserError: `x` is wider than `c`, or the dtypes differ or are not float32 or float64.

    In the example, x is a unit vector, so the result is c, shifted cyclically by one place to the right.

    >>> circular_convolve(jnp.array([0.0, 1.0, 0.0]), jnp.array([1.0, 2.0, 3.0])).round().astype(jnp.int32)
    Array([3, 1, 2], dtype=int32)
    """
    _check_operands("circular_convolve", x, "c", c)
    return _convolve_rows(x, c)


def skew_convolve(x: Float[Array, "*batch m"], v: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    """Return the skew-circular (also called negacyclic) convolution of `x` and `v` over the last axis.

    The result is `y_j = sum_{i<=j} x_i v_{j-i} - sum_{i>j} x_i v_{n+j-i}`. This is a circular convolution in which
    the terms that wrap around change their sign. The values y are the coefficients of the product, modulo `z^n + 1`, of
    two polynomials in z with the coefficients `x` and `v`. The convolution is computed as `S y = S x * S v` with the
    transform S of `skew_fft`. It costs as much as `circular_convolve` with the same n, and stores arrays of the same
    sizes for the backward pass.

    Args:
        x: Array of shape (..., m) with m <= n. It is padded with zeros to length n.
        v: Array of shape (n,), with the same dtype as `x`.

    Returns:
        An array of shape (..., n) in the dtype of `x`, which is float32 or float64.

    Raises:
        UserError: `x` is wider than `v`, or the dtypes differ or are not float32 or float64.

    In the example, x is a unit vector, so the result is v, shifted cyclically by one place to the right. The entry that
    wraps around changes its sign.

    >>> skew_convolve(jnp.array([0.0, 1.0, 0.0]), jnp.array([1.0, 2.0, 3.0])).round().astype(jnp.int32)
    Array([-3,  1,  2], dtype=int32)
    """
    _check_operands("skew_convolve", x, "v", v)
    return _skew_convolve_rows(x, v)


def skew_fft(x: Float[Array, "*batch m"], n: int) -> Complex[Array, "*batch k"]:
    """Return the transform S x of `x`, which turns a skew-circular convolution into an entrywise product.

    Let p be the polynomial in z with the coefficients `x`. S x holds the values of p at about half of the n roots of
    `z^n = -1`. These roots come in complex conjugate pairs, and for odd n there is also the real root -1. One root of
    each pair is enough, because the values of p at the two roots are complex conjugates, too, if `x` is real.

    - If n is even, then `z^n + 1 = (z^(n/2) - i)(z^(n/2) + i)`. S x holds the values at the roots of the first factor.
      Modulo this factor, p has the n/2 coefficients `x_j + i x_{j+n/2}`. Replacing z by `w u` with `w = exp(i pi / n)`
      turns the equation `z^(n/2) = i` of the roots into `u^(n/2) = 1`. So S x is one complex FFT of length k = n/2.
    - If n is odd, replacing z by `-u` turns the equation `z^n = -1` of the roots into `u^n = 1`. So S x is one real FFT
      of length n, with k = (n+1)/2 values.

    Both cost as much as `jnp.fft.rfft` of length n. The method of arXiv 2406.17740, which scales `x` by powers of a
    complex root of -1, needs a complex FFT of length n, which costs twice as much. On a mesh, call this function inside
    `batch_local`, because otherwise XLA gathers `x` on every device.

    Args:
        x: Array of shape (..., m) with m <= n, in float32 or float64. It is padded with zeros to length n.
        n: Length of the convolution.

    Returns:
        A complex array of shape (..., k) with k = n/2 for even n and k = (n+1)/2 for odd n.
    """
    if n % 2:
        return jnp.fft.rfft(x * _for_rows(_signs(n, x.dtype)[: x.shape[-1]], x), n=n)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - x.shape[-1])])
    folded = jax.lax.complex(x[..., : n // 2], x[..., n // 2 :])
    return jnp.fft.fft(folded * _for_rows(_twist(n, folded.dtype), x))


def inverse_skew_fft(spectrum: Complex[Array, "*batch k"], n: int) -> Float[Array, "*batch n"]:
    """Return the real array x, of shape (..., n), for which `skew_fft(x, n) = spectrum`."""
    if n % 2:
        x = jnp.fft.irfft(spectrum, n=n)
        return x * _for_rows(_signs(n, x.dtype), x)
    folded = jnp.fft.ifft(spectrum)
    folded = folded * _for_rows(_twist(n, folded.dtype).conj(), folded)
    return jnp.concatenate([folded.real, folded.imag], axis=-1)


def fast_length(n: int) -> int:
    """Return a length of at least n for which FFTs are fast: the smallest one without a prime factor above 5.

    It exceeds n by at most a seventh of n for n >= 14, and by at most a ninth of n for n >= 33. The next power of two
    could be almost twice as large as n.

    Args:
        n: An integer of at least 1.

    Raises:
        UserError: n is less than 1.

    >>> [fast_length(n) for n in (1, 7, 601, 1535)]
    [1, 8, 625, 1536]
    """
    if n < 1:
        raise UserError(f"fast_length: n must be at least 1, not {n}")
    best = 5 * n
    five = 1
    while five < best:
        fifteen = five
        while fifteen < best:
            # `fifteen` times the smallest power of two for which the product is at least n.
            best = min(best, fifteen << (-(-n // fifteen) - 1).bit_length())
            fifteen *= 3
        five *= 5
    return best


def _check_operands(owner: str, x: Array, name: str, c: Array) -> None:
    if x.ndim == 0 or c.ndim != 1 or x.shape[-1] > c.shape[0]:
        raise UserError(f"{owner}: x (..., m) and {name} (n,) need m <= n, but have shapes {x.shape} and {c.shape}")
    if x.dtype != c.dtype or x.dtype not in (jnp.float32, jnp.float64):
        raise UserError(f"{owner}: x and {name} must both be float32 or both float64, not {x.dtype} and {c.dtype}")


@batch_local
def _convolve_rows(x: Float[Array, "*batch m"], c: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    n = c.shape[0]
    # Without the argument n, irfft would return n - 1 values for every odd n.
    return jnp.fft.irfft(jnp.fft.rfft(x, n=n) * _for_rows(jnp.fft.rfft(c), x), n=n)


@batch_local
def _skew_convolve_rows(x: Float[Array, "*batch m"], v: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    n = v.shape[0]
    return inverse_skew_fft(skew_fft(x, n) * _for_rows(skew_fft(v, n), x), n)


def _for_rows(row: Array, x: Array) -> Array:
    """Add leading dimensions of size 1 to `row`, of shape (n,), so that it has as many dimensions as `x`."""
    return jnp.expand_dims(row, tuple(range(x.ndim - 1)))


def _signs(n: int, dtype: DTypeLike) -> Float[Array, " n"]:
    """Return the array of `(-1)^j` for 0 <= j < n.

    Multiplying the coefficients of a polynomial by it replaces the variable z by -z, which `skew_fft` needs for odd n.
    """
    return jnp.asarray(1 - 2 * (np.arange(n) % 2), dtype)


def _twist(n: int, dtype: DTypeLike) -> Complex[Array, " n/2"]:
    """Return the array of `w^j` for 0 <= j < n/2, with `w = exp(i pi / n)`, a root of `z^n = -1`.

    Multiplying the coefficients of a polynomial by it replaces the variable z by `w z`, which `skew_fft` needs for even
    n. The values are computed in double precision and rounded once to `dtype`.
    """
    return jnp.asarray(np.exp(1j * np.pi * np.arange(n // 2) / n), dtype)
