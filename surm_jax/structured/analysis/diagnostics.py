"""Rank, determinant, condition and displacement rank of matrices, for studies of trained updates.

Each function takes a structured matrix or a dense array and works in double precision. A unitary matrix diagonalises
square circulants and skew-circulants, so their eigenvalues are a Fourier transform of their numbers, O(n log n), and
their singular values are the absolute eigenvalues. Every other matrix, even a Toeplitz matrix, is formed and passed to
LAPACK. Levinson's O(n^2) recursion for Toeplitz matrices (`scipy.linalg.solve_toeplitz`) breaks down where a leading
block is singular, even if the matrix is perfectly conditioned. The LU factorisation with pivoting and the SVD are
stable for all matrices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Complex, Float

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix, compute_dtype
from surm_jax.structured.families.circulant import Circulant
from surm_jax.structured.families.f_circulant import FCirculant, SkewCirculant

AnyMatrix = StructuredMatrix | Float[ArrayLike, "in out"]
"""A structured matrix, or a dense one as an array."""


def singular_values(matrix: AnyMatrix) -> Float[np.ndarray, " k"]:
    """Return all min(in, out) singular values, the largest first, in float64.

    For square circulants and skew-circulants (also pairs, and `FCirculant` with f = 1 or -1) they are the absolute
    eigenvalues, O(n log n). Otherwise they come from an SVD of the dense matrix, O(m n min(m, n)).

    Raises:
        UserError: The argument is not a matrix of finite real numbers.

    >>> singular_values(Circulant(jnp.array([1.0, 1.0]), shape=(2, 2)))
    array([2., 0.])
    """
    matrix = _in_double("singular_values", matrix)
    spectrum = _spectrum(matrix)
    if spectrum is None:
        return np.linalg.svd(_dense(matrix), compute_uv=False)
    return np.sort(np.abs(spectrum))[::-1]


def numerical_rank(matrix: AnyMatrix, *, rtol: float | None = None) -> int:
    """Return the number of singular values above `rtol` times the largest.

    For a circulant this is the number of its non-zero Fourier coefficients.

    Args:
        matrix: A structured matrix or an array (in_features, out_features).
        rtol: Relative tolerance, by default that of `numpy.linalg.matrix_rank`, `max(in, out) * eps`. Here eps belongs
            to the given numbers (float64 if an array is float64, otherwise float32), not to the float64 of the result.

    Raises:
        UserError: The argument is not a matrix of finite real numbers.

    >>> numerical_rank(Circulant(jnp.array([1.0, 1.0]), shape=(2, 2)))
    1
    """
    values = singular_values(matrix)
    rtol = _default_rtol(matrix) if rtol is None else rtol
    return int(np.count_nonzero(values > values[0] * rtol))


def condition_number(matrix: AnyMatrix) -> float:
    """Return the condition number of a square matrix in the 2-norm: its largest over its smallest singular value.

    It is infinite if a singular value is zero. A value near or above 1e16 (1e7 if the numbers were rounded to float32)
    only says that the matrix is singular up to rounding.

    Raises:
        UserError: The matrix is not square, or has numbers that are not finite and real.

    >>> condition_number(Circulant(jnp.array([3.0, 1.0]), shape=(2, 2)))
    2.0
    """
    values = singular_values(_in_double("condition_number", matrix, square=True))
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def log_determinant(matrix: AnyMatrix) -> tuple[float, float]:
    """Return the sign of a square matrix's determinant (1, -1, or 0) and the logarithm of its absolute value.

    For circulants and skew-circulants the determinant is the product of the eigenvalues, O(n log n). Otherwise
    `numpy.linalg.slogdet` computes it by an LU factorisation, O(n^3). A determinant of zero gives 0 and minus infinity.

    Raises:
        UserError: The matrix is not square, or has numbers that are not finite and real.

    >>> sign, log = log_determinant(Circulant(jnp.array([1.0, 3.0]), shape=(2, 2)))
    >>> sign, round(float(np.exp(log)), 12)
    (-1.0, 8.0)
    """
    matrix = _in_double("log_determinant", matrix, square=True)
    spectrum = _spectrum(matrix)
    if spectrum is None:
        sign, log = np.linalg.slogdet(_dense(matrix))
        return float(sign), float(log)
    sizes = np.abs(spectrum)
    if not np.all(sizes > 0):
        return 0.0, float("-inf")
    # The eigenvalues of a real matrix are real or come in conjugate pairs, whose phases cancel.
    return float(np.sign(np.prod(spectrum / sizes).real)), float(np.sum(np.log(sizes)))


def displacement_rank(matrix: AnyMatrix, *, f: float = 1.0, g: float = -1.0, rtol: float | None = None) -> int:
    """Return the numerical rank of `Z_f W - W Z_g` for the paper's W, which is the transpose of the given matrix M.

    `Z_f` has ones below the diagonal and f in the upper right corner: it shifts rows down by one and puts f times the
    last row on top. The displacement rank of arXiv 2406.17740 has f = 1 and g = -1. It is 1 for circulant and
    skew-circulant matrices, at most 2 for Toeplitz matrices and their inverses, and at most r for `W(G, H)`. In the
    orientation of this package it is the rank of `M Z_f^T - Z_g^T M`. If f = g, the displacement does not determine W:
    with f = g = 1 it vanishes for every circulant.

    Args:
        matrix: M, a structured matrix or an array (in_features, out_features), square or not: `Z_f` is out x out, `Z_g`
            in x in.
        f: The factor f of `Z_f`, which multiplies W from the left.
        g: The factor g of `Z_g`, which multiplies W from the right.
        rtol: As in `numerical_rank`, but relative to the largest singular value of M: the displacement is a difference
            of numbers of that size, and its rounding errors are relative to them.

    Raises:
        UserError: The argument is not a matrix of finite real numbers.

    >>> displacement_rank(Circulant(jnp.array([1.0, 2.0, 4.0]), shape=(3, 3)))
    1
    >>> displacement_rank(np.eye(3)[:, ::-1])
    3
    """
    W = _dense(_in_double("displacement_rank", matrix)).T
    down, left = np.roll(W, 1, axis=0), np.roll(W, -1, axis=1)
    down[0] *= f
    left[:, -1] *= g
    values = np.linalg.svd(down - left, compute_uv=False)
    rtol = _default_rtol(matrix) if rtol is None else rtol
    return int(np.count_nonzero(values > singular_values(W)[0] * rtol))


@functools.singledispatch
def _spectrum(matrix: StructuredMatrix | Float[np.ndarray, "m n"]) -> Complex[np.ndarray, " n"] | None:
    """Return the eigenvalues of a float64 matrix whose structure makes it normal, or None for any other matrix."""
    del matrix
    return None


@_spectrum.register
def _(matrix: Circulant) -> Complex[np.ndarray, " n"] | None:
    return _fourier(matrix.c, matrix.shape, 1.0)


@_spectrum.register
def _(matrix: SkewCirculant) -> Complex[np.ndarray, " n"] | None:
    return _fourier(matrix.v, matrix.shape, -1.0)


@_spectrum.register
def _(matrix: FCirculant) -> Complex[np.ndarray, " n"] | None:
    return _fourier(matrix.v, matrix.shape, matrix.f)


def _fourier(v: Float[ArrayLike, " n"], shape: tuple[int, int], f: float) -> Complex[np.ndarray, " n"] | None:
    """Return the values of the polynomial v at the nth roots of f: the eigenvalues of `Z_f(v)` and of its transpose.

    Return None unless the matrix is square and f is 1 or -1: other f-circulants are not normal, and their singular
    values are not the absolute eigenvalues.
    """
    m, n = shape
    if m != n or abs(f) != 1:
        return None
    v = np.asarray(v)
    return np.fft.fft(v if f == 1 else v * np.exp(-1j * np.pi * np.arange(n) / n))


def _in_double(owner: str, matrix: AnyMatrix, *, square: bool = False) -> StructuredMatrix | Float[np.ndarray, "m n"]:
    """Check a matrix and return it in float64: an array, or the compact form of a structured matrix."""
    if not isinstance(matrix, StructuredMatrix):
        matrix = np.asarray(matrix)
        if matrix.ndim != 2 or 0 in matrix.shape or not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise UserError(
                f"{owner} takes a structured matrix or a non-empty floating-point matrix (in_features, out_features), "
                f"not {matrix.dtype} of shape {matrix.shape}"
            )
    m, n = matrix.shape
    if square and m != n:
        raise UserError(f"{owner} is for square matrices, but this one is {m} x {n}; singular_values takes any shape")
    doubles = {name: np.asarray(leaf, np.float64) for name, leaf in _leaves(matrix).items()}
    if not all(np.all(np.isfinite(leaf)) for leaf in doubles.values()):
        raise UserError(f"{owner}: the {m} x {n} matrix holds numbers that are not finite")
    if not isinstance(matrix, StructuredMatrix):
        return doubles["matrix"]
    with jax.enable_x64(True):
        return matrix.with_arrays(**doubles).compact()


def _dense(matrix: StructuredMatrix | Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    if not isinstance(matrix, StructuredMatrix):
        return matrix
    with jax.enable_x64(True):
        return np.asarray(matrix.to_dense())


def _default_rtol(matrix: AnyMatrix) -> float:
    """Return the tolerance of `numpy.linalg.matrix_rank`, at the precision of the given numbers."""
    shape = matrix.shape if isinstance(matrix, StructuredMatrix) else np.shape(matrix)
    return max(shape) * float(jnp.finfo(compute_dtype(*(leaf.dtype for leaf in _leaves(matrix).values()))).eps)


def _leaves(matrix: AnyMatrix) -> dict[str, np.ndarray]:
    arrays = matrix.arrays() if isinstance(matrix, StructuredMatrix) else {"matrix": matrix}
    return {name: np.asarray(leaf) for name, leaf in arrays.items()}
