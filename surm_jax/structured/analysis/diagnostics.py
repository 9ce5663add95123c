"""Rank, determinant, condition number and displacement rank of matrices, for studies of trained updates.

Each function takes a structured matrix or a dense array and computes in float64. For square circulant and
skew-circulant matrices, a Fourier transform of the parameters gives the eigenvalues in O(n log n), and the singular
values are their absolute values.

For every other matrix, the functions form the dense matrix and call LAPACK (an SVD, or an LU factorisation with
pivoting), which is numerically stable. Levinson's O(n^2) recursion for Toeplitz matrices
(`scipy.linalg.solve_toeplitz`) would be faster, but fails if a leading block is singular.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix, compute_dtype
from surm_jax.structured.families.base import Family

AnyMatrix = StructuredMatrix | Float[ArrayLike, "in out"]
"""A structured matrix, or a dense matrix as an array."""


def singular_values(matrix: AnyMatrix) -> Float[np.ndarray, " k"]:
    """Return all min(m, n) singular values of an m x n matrix, the largest first, in float64.

    For a square circulant or skew-circulant matrix, they are the absolute values of the eigenvalues and cost
    O(n log n). This includes `CirculantPair`, and `FCirculant` with f = 1 or -1. For any other matrix, they come from
    an SVD of the dense matrix, which costs O(m n min(m, n)).

    Raises:
        UserError: The argument is not a matrix of finite real numbers.

    In the example, all entries of the 2 x 2 matrix are 1, so its eigenvalues are 2 and 0.

    >>> from surm_jax.structured import Circulant
    >>> singular_values(Circulant(jnp.array([1.0, 1.0]), shape=(2, 2)))
    array([2., 0.])
    """
    matrix = _in_double("singular_values", matrix)
    spectrum = matrix.spectrum() if isinstance(matrix, Family) else None
    if spectrum is None:
        return np.linalg.svd(_dense(matrix), compute_uv=False)
    return np.sort(np.abs(spectrum))[::-1]


def numerical_rank(matrix: AnyMatrix, *, rtol: float | None = None) -> int:
    """Return the number of singular values that are larger than `rtol` times the largest singular value.

    For a square circulant matrix, this is the number of Fourier coefficients of its vector that are not zero.

    Args:
        matrix: A structured matrix, or an array of shape (in_features, out_features).
        rtol: Relative tolerance. The default is that of `numpy.linalg.matrix_rank`, `max(in_features, out_features) *
            eps`. Here eps is the machine epsilon of float64 if an array of the matrix is float64, and otherwise that of
            float32, although the singular values are always computed in float64.

    Raises:
        UserError: The argument is not a matrix of finite real numbers.

    In the example, the singular values are 2 and 0.

    >>> from surm_jax.structured import Circulant
    >>> numerical_rank(Circulant(jnp.array([1.0, 1.0]), shape=(2, 2)))
    1
    """
    values = singular_values(matrix)
    rtol = _default_rtol(matrix) if rtol is None else rtol
    return int(np.count_nonzero(values > values[0] * rtol))


def condition_number(matrix: AnyMatrix) -> float:
    """Return the condition number of a square matrix in the 2-norm.

    It is the largest singular value divided by the smallest one, and infinite if a singular value is zero. A value of
    about 1e16 or more is not exact: it means that the matrix is singular up to rounding in float64. If the entries of
    the matrix were rounded to float32, this already applies to values of about 1e7 or more.

    Raises:
        UserError: The matrix is not square, or has entries that are not finite and real.

    In the example, the eigenvalues of the matrix are 4 and 2.

    >>> from surm_jax.structured import Circulant
    >>> condition_number(Circulant(jnp.array([3.0, 1.0]), shape=(2, 2)))
    2.0
    """
    values = singular_values(_in_double("condition_number", matrix, square=True))
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def log_determinant(matrix: AnyMatrix) -> tuple[float, float]:
    """Return the sign of the determinant of a square matrix, and the logarithm of its absolute value.

    The sign is 1.0, -1.0 or 0.0. If the determinant is zero, the result is 0.0 and minus infinity. For circulant and
    skew-circulant matrices the determinant is the product of the eigenvalues, which costs O(n log n). For any other
    matrix, `numpy.linalg.slogdet` computes it by an LU factorisation, which costs O(n^3).

    Raises:
        UserError: The matrix is not square, or has entries that are not finite and real.

    In the example, the determinant of the 2 x 2 matrix is 1 - 9 = -8.

    >>> from surm_jax.structured import Circulant
    >>> sign, log = log_determinant(Circulant(jnp.array([1.0, 3.0]), shape=(2, 2)))
    >>> sign, round(float(np.exp(log)), 12)
    (-1.0, 8.0)
    """
    matrix = _in_double("log_determinant", matrix, square=True)
    spectrum = matrix.spectrum() if isinstance(matrix, Family) else None
    if spectrum is None:
        sign, log = np.linalg.slogdet(_dense(matrix))
        return float(sign), float(log)
    sizes = np.abs(spectrum)
    if not np.all(sizes > 0):
        return 0.0, float("-inf")
    # The eigenvalues of a real matrix are real or come in conjugate pairs, whose phases cancel.
    return float(np.sign(np.prod(spectrum / sizes).real)), float(np.sum(np.log(sizes)))


def displacement_rank(matrix: AnyMatrix, *, f: float = 1.0, g: float = -1.0, rtol: float | None = None) -> int:
    """Return the displacement rank of a matrix M, which is the numerical rank of `Z_f W - W Z_g` for `W = M^T`.

    The matrix `Z_f W - W Z_g` is called the displacement of W. `Z_f` is the square matrix with ones directly below the
    diagonal, f in the upper right corner, and zeros elsewhere. Multiplying W by it from the left shifts the rows of W
    down by one and puts f times the last row on top. The function uses W, and not M, to follow the paper (arXiv
    2406.17740), in which a layer computes `y = W x`. In this package, a layer computes `y = x @ M`. The transpose of
    the displacement, `M Z_f^T - Z_g^T M`, has the same rank.

    The paper uses f = 1 and g = -1. With these, the displacement rank is at most 1 for circulant and skew-circulant
    matrices, at most 2 for Toeplitz matrices and their inverses, and at most r for matrices of the family
    `LowDisplacementRank` with rank r and `transposed=False`, whose W the paper writes as `W(G, H)`. If f = g, the
    displacement does not determine W. For example, with f = g = 1 it is zero for every circulant matrix.

    Args:
        matrix: M, a structured matrix or an array of shape (in_features, out_features), square or not. `Z_f` has
            out_features rows, and `Z_g` has in_features rows.
        f: The corner entry of `Z_f`, which multiplies W from the left.
        g: The corner entry of `Z_g`, which multiplies W from the right.
        rtol: Relative tolerance, with the same default as in `numerical_rank`. Singular values of the displacement
            count if they are larger than `rtol` times the largest singular value of M, because the rounding errors of
            the displacement are proportional to the entries of M.

    Raises:
        UserError: The argument is not a matrix of finite real numbers.

    The first example is a circulant matrix. The second is the identity with its columns in reverse order, whose
    displacement is invertible, so its displacement rank is 3.

    >>> from surm_jax.structured import Circulant
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


def _in_double(owner: str, matrix: AnyMatrix, *, square: bool = False) -> StructuredMatrix | Float[np.ndarray, "m n"]:
    """Check a matrix, and return it in float64: an array as a NumPy array, a structured matrix in its compact form.

    Args:
        owner: Name of the public function that calls this one, for the message of an error.
        matrix: The matrix to check.
        square: Whether the matrix must be square.

    Raises:
        UserError: The argument is not a matrix of finite real numbers, or it must be square and is not.
    """
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
    """Return the default tolerance of `numpy.linalg.matrix_rank`, with the machine epsilon of the arrays' dtype."""
    shape = matrix.shape if isinstance(matrix, StructuredMatrix) else np.shape(matrix)
    return max(shape) * float(jnp.finfo(compute_dtype(*(leaf.dtype for leaf in _leaves(matrix).values()))).eps)


def _leaves(matrix: AnyMatrix) -> dict[str, np.ndarray]:
    arrays = matrix.arrays() if isinstance(matrix, StructuredMatrix) else {"matrix": matrix}
    return {name: np.asarray(leaf) for name, leaf in arrays.items()}
