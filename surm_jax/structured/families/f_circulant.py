"""f-circulant matrices: circulant matrices in which the entries that wrap around are multiplied by a number f.

In the paper (arXiv 2406.17740) `Z_f(v)` has the first column v, and `Z_f(v)[i, j] = v[i - j]` for i >= j and
`f * v[N + i - j]` for i < j. Here `y = x @ M` with `M = Z_f(v)^T`, so that the first ROW of `M` is v. f = 1 gives
`Circulant`, f = -1 gives `SkewCirculant`, and f = 0 gives the upper triangular Toeplitz matrices. The entries of `M`
below the main diagonal (j < i) are those that wrap around.

A rectangular m x n matrix is the top-left m x n block of a square matrix of size `N = max(m, n)`, and has N parameters.
Inputs are padded with zeros, and outputs are truncated.
"""

import math
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import checked_shape, static
from surm_jax.structured.families.base import Family, LinearInVector, checked_dense, family
from surm_jax.structured.products.diagonals import from_wrapped_diagonals, wrapped_spectrum
from surm_jax.structured.products.fourier import circular_convolve, skew_convolve


@family
class SkewCirculant(LinearInVector):
    """Skew-circulant matrix `M = Z_{-1}(v)^T` of arXiv 2406.17740: `M[i, j] = v[j - i]`, or `-v[N + j - i]` if j < i.

    If the entries of x and v are read as coefficients of polynomials in z, `x @ M` is their product modulo `z^N + 1`.
    Like `Circulant`, the matrix has N parameters, and the product takes O(N log N) operations per row of x. Products
    and sums of square skew-circulant matrices are skew-circulant.

    Attributes:
        v: (N,), N = max(in, out): the first row of `M`, which is the first column of the paper's `W`.
        shape: `(in_features, out_features)`.

    >>> SkewCirculant(jnp.array([1.0, 2.0, 3.0]), shape=(3, 3)).to_dense()
    Array([[ 1.,  2.,  3.],
           [-3.,  1.,  2.],
           [-2., -3.,  1.]], dtype=float32)
    """

    _title = "skew-circulant"

    v: Float[Array, " N"]
    shape: tuple[int, int] = static()

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return the skew-circulant matrix nearest to `dense` in the Frobenius norm.

        `v[k]` is the mean of the entries (i, j) of `dense` with j - i = k mod N, as in `Circulant.nearest`, but entries
        that wrap around (j < i) enter the mean with a minus sign. It takes O(m n) operations.

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        if m > n:
            return cls(v=_reverse(cls.nearest(dense.T).v, -1), shape=(m, n))
        return cls(v=_diagonal_means(dense, -1.0, transposed=False), shape=(m, n))

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((5, 8))

    def spectrum(self) -> Complex[np.ndarray, " n"] | None:
        """Return the eigenvalues of a square matrix, an FFT of the vector, and None for a rectangular one."""
        return wrapped_spectrum(self.v, self.shape, -1.0)

    @property
    def T(self) -> "SkewCirculant":
        """The transpose: the skew-circulant matrix of the vector `v[0], -v[N-1], ..., -v[1]`."""
        return SkewCirculant(v=_reverse(self.v, -1), shape=self.shape[::-1])

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return skew_convolve(x, self.v)[..., : self.shape[1]]

    def _dense(self) -> Float[Array, "in out"]:
        return from_wrapped_diagonals(self.v, self.shape, -1.0)


@family
class FCirculant(Family):
    """f-circulant matrix `M = Z_f(v)^T` of arXiv 2406.17740: `M[i, j] = v[j - i]`, or `f * v[N + j - i]` if j < i.

    `Z_f(v) = (1 + f)/2 Z_1(v) + (1 - f)/2 Z_{-1}(v)` for every real f. So `x @ M` is the weighted sum of a circular and
    a skew-circular convolution, and takes O(N log N) operations per row of x. For f = 1 or f = -1, one of the two
    weights is zero, and only the other convolution is computed. The usual method instead turns `M` into a circulant
    matrix: it multiplies rows and columns by powers of the Nth root of f. That method loses digits as f approaches 0
    and fails at f = 0. The rounding errors of the method used here are proportional to the larger of 1 and abs(f).

    In the example, the transpose `M.T` stores the same vector v and sets `transposed`.

    Attributes:
        v: (N,), N = max(in, out): the first row of `M`, or its first column if `transposed` is True.
        shape: `(in_features, out_features)`.
        f: Any finite real number. It belongs to the pytree structure and is not trained.
        transposed: Whether `M = Z_f(v)` instead of `Z_f(v)^T`. The transpose of an f-circulant matrix is
            (1/f)-circulant. As 1/f does not exist for f = 0 and is very large near 0, the transpose keeps f and sets
            this flag.

    >>> M = FCirculant(jnp.array([1.0, 2.0, 3.0]), shape=(3, 3), f=10.0)
    >>> M.to_dense()
    Array([[ 1.,  2.,  3.],
           [30.,  1.,  2.],
           [20., 30.,  1.]], dtype=float32)
    >>> M.T
    FCirculant(v=float32[3], shape=(3, 3), f=10.0, transposed=True)
    """

    option_names = ("f",)

    v: Float[Array, " N"]
    shape: tuple[int, int] = static()
    f: float = static()
    transposed: bool = static(default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        object.__setattr__(self, "f", _checked_f(self.f))
        self._check_leaf("v", (max(self.shape),))

    @classmethod
    def init(
        cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, f: float, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """Return the zero matrix, with which training starts.

        No array is random. `M` is linear in `v`, so the gradient of `v` is not zero at the start.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            f: The factor by which entries that wrap around are multiplied.
            dtype: Dtype of `v`.

        Raises:
            UserError: The shape is not two positive integers, or f is not a finite real number.
        """
        shape = checked_shape(cls.__name__, shape)
        return cls(v=jnp.zeros(max(shape), dtype), shape=shape, f=f)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, f: float) -> Self:
        """Return the f-circulant matrix nearest to `dense` in the Frobenius norm, with `transposed = False`.

        `v[k] = sum(w D) / sum(w^2)`. Both sums run over the entries D of `dense` at (i, j) with j - i = k mod N, which
        form a wrapped diagonal. The weight w is f for entries that wrap around and 1 for the others. This is the
        projection, because the matrices that hold w on one wrapped diagonal and 0 elsewhere are orthogonal. If f = 0
        and all entries of a wrapped diagonal wrap around, no entry of the matrix depends on `v[k]`, and `v[k]` is 0.
        The projection takes O(m n) operations.

        For the nearest matrix with `transposed = True`, pass the transpose of `dense` and transpose the result.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            f: The factor by which entries that wrap around are multiplied.

        Raises:
            UserError: `dense` is not a floating-point matrix, or f is not a finite real number.
        """
        dense, f = checked_dense(cls.__name__, dense), _checked_f(f)
        m, n = dense.shape
        v = _diagonal_means(dense.T, f, transposed=True) if m > n else _diagonal_means(dense, f, transposed=False)
        return cls(v=v, shape=(m, n), f=f)

    @property
    def title(self) -> str:
        """The name in tables and pictures: "triangular Toeplitz" for f = 0, otherwise "f-circulant"."""
        return "triangular Toeplitz" if self.f == 0 else "f-circulant"

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the option f = 0 if a matrix with N parameters is within the budget, otherwise None.

        Every f gives N parameters. f = 0 gives triangular Toeplitz matrices, which are no circulants.
        """
        return cls._if_within(shape, budget, {"f": 0.0})

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: f = 0.5."""
        del shape
        return ({"f": 0.5},)

    def spectrum(self) -> Complex[np.ndarray, " n"] | None:
        """Return the eigenvalues of a square matrix with f = 1 or f = -1, and None for any other matrix."""
        return wrapped_spectrum(self.v, self.shape, self.f)

    @property
    def T(self) -> "FCirculant":
        """The transpose: the same vector v, with the opposite value of `transposed`."""
        return FCirculant(v=self.v, shape=self.shape[::-1], f=self.f, transposed=not self.transposed)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        terms = []
        for weight, convolve, sign in (((1 + self.f) / 2, circular_convolve, 1), ((1 - self.f) / 2, skew_convolve, -1)):
            if weight != 0:
                terms.append(convolve(x, weight * (_reverse(self.v, sign) if self.transposed else self.v)))
        return sum(terms[1:], terms[0])[..., : self.shape[1]]

    def _dense(self) -> Float[Array, "in out"]:
        if self.transposed:
            return from_wrapped_diagonals(self.v, self.shape[::-1], self.f).T
        return from_wrapped_diagonals(self.v, self.shape, self.f)


def _checked_f(f: float) -> float:
    try:
        f = float(f)
    except (TypeError, ValueError):
        raise UserError(f"FCirculant: f must be a real number, not {f!r}") from None
    if not math.isfinite(f):
        raise UserError(f"FCirculant: f must be finite, not {f}")
    return f


def _reverse(v: Float[Array, " N"], sign: int) -> Float[Array, " N"]:
    """Return the vector u whose matrix `Z_f(u)` is the transpose of `Z_f(v)`, for f = sign.

    It is `u = (v[0], sign v[N-1], ..., sign v[1])`.
    """
    return jnp.concatenate([v[:1], sign * v[:0:-1]])


def _diagonal_means(dense: Float[Array, "m n"], f: float, *, transposed: bool) -> Float[Array, " n"]:
    """Return the vector v of `FCirculant.nearest` for `dense` with m <= n: weighted means of its wrapped diagonals.

    If `transposed` is True, v belongs to the nearest `Z_f(v)`, otherwise to the nearest `Z_f(v)^T`.
    """
    m, n = dense.shape
    i, k = jnp.arange(m)[:, None], jnp.arange(n)[None, :]
    # Row i is rolled so that wrapped diagonal k becomes column k. j mod n is the column of the entry in `dense`.
    j = i - k if transposed else i + k
    entries = dense[i, j % n]
    wraps: Bool[Array, "m n"] = (j < 0) if transposed else (j >= n)
    weights = jnp.where(wraps, jnp.asarray(f, dense.dtype), 1)
    # The weights of each diagonal are divided by the largest one, because the square of a very large or very small f
    # would overflow or underflow.
    unit = jnp.max(jnp.abs(weights), axis=0)
    weights = weights / jnp.where(unit > 0, unit, 1)[None]
    size = jnp.sum(jnp.square(weights), axis=0) * unit
    return jnp.sum(weights * entries, axis=0) / jnp.where(size > 0, size, 1)
