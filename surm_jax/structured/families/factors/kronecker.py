"""Kronecker products and sums of Kronecker products.

They have few parameters. With the default shapes of the factors, their rank is often nearly full.

The paper (arXiv 2406.17740) writes `W x` with `W = A (x) B`, where `(x)` is the Kronecker product. Here `y = x @ M`
with `M = W^T = A^T (x) B^T`, because the transpose of a Kronecker product is the product of the transposed factors. So
the factors `A` and `B` in this file are the transposes of the paper's factors.

The shapes of the two factors multiply to the shape of the matrix, which may be rectangular. Nothing is padded. If
in_features or out_features is prime, one of the factors has a single row or column, and the Kronecker product may have
rank 1.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.devices.batch import batch_local
from surm_jax.errors import UserError
from surm_jax.structured.base import Piece, checked_shape, sum_pieces
from surm_jax.structured.families.base import Family, checked_dense, family, largest_size, scaled_normal

FactorShapes = tuple[tuple[int, int], tuple[int, int]]
"""The shapes `(m1, n1), (m2, n2)` of the two factors of a Kronecker product, whose shape is (m1 m2, n1 n2)."""


@family
class Kronecker(Family):
    """Sum of k Kronecker products, `M = sum_k A_k (x) B_k`.

    Its entries are `M[i1 m2 + i2, j1 n2 + j2] = sum_k A[k, i1, j1] B[k, i2, j2]`. `M` is the transpose of the `W` of
    arXiv 2406.17740, with each factor transposed.

    If a row of x is reshaped to an m1 x m2 matrix X, the row of `x @ M` is `sum_k A_k^T X B_k`, reshaped to a vector. X
    is multiplied by A and B in the cheaper order. For each row of x, this takes k (m1 n1 m2 + n1 m2 n2) multiplications
    if A comes first, and k (m1 m2 n2 + m1 n1 n2) if B comes first. With one term and factors of 32 x 24 and 24 x 32,
    these are 36,864 multiplications, while a dense 768 x 768 matrix takes 589,824. The rank of one Kronecker product is
    the rank of A times the rank of B.

    Attributes:
        A: (k, m1, n1), the first factors of all products. It is zero when training starts.
        B: (k, m2, n2), the second factors of all products. It is random when training starts.

    >>> Kronecker(A=jnp.array([[[1.0, 2.0, 3.0]]]), B=jnp.array([[[1.0], [10.0]]])).to_dense()
    Array([[ 1.,  2.,  3.],
           [10., 20., 30.]], dtype=float32)
    """

    option_names = ("terms", "factor_shapes")
    _title = "Kronecker"

    A: Float[Array, "k m1 n1"]
    B: Float[Array, "k m2 n2"]

    def __post_init__(self) -> None:
        if self.A is None and self.B is None:
            return
        self._check_dimensions(A="(k, m1, n1)", B="(k, m2, n2)")
        self._check_leaf("A", (self.terms, *self.factor_shapes[0]))
        self._check_leaf("B", (self.terms, *self.factor_shapes[1]))
        check_terms("Kronecker", self.terms, self.factor_shapes)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        (m1, n1), (m2, n2) = self.factor_shapes
        return m1 * m2, n1 * n2

    @property
    def factor_shapes(self) -> FactorShapes:
        """The shapes `(m1, n1), (m2, n2)` of `A_k` and `B_k`."""
        (m1, n1), (m2, n2) = self.A.shape[-2:], self.B.shape[-2:]
        return (m1, n1), (m2, n2)

    @property
    def terms(self) -> int:
        """The number k of Kronecker products that are summed."""
        return self.A.shape[-3]

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        *,
        scale: float,
        terms: int = 1,
        factor_shapes: FactorShapes | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Return the matrix with which training starts: it is zero, with `A = 0` and `B = scale * N(0, 1)`.

        If both arrays were zero, both gradients would be zero too, and training could not change them.

        Args:
            key: Random key for `B`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `B`.
            terms: Number of Kronecker products in the sum, from 1 to min(m1 n1, m2 n2).
            factor_shapes: Shapes `((m1, n1), (m2, n2))` of the factors, with m1 m2 = in_features and n1 n2 =
                out_features. The default is `near_square_factors(shape)`.
            dtype: Dtype of both arrays.

        Raises:
            UserError: The shape is not two positive integers, or the shapes of the factors or the number of terms are
                not possible for it.
        """
        factors = checked_factors(cls.__name__, factor_shapes, checked_shape(cls.__name__, shape))
        check_terms(cls.__name__, terms, factors)
        B = scaled_normal(key, (terms, *factors[1]), scale, dtype)
        return cls(A=jnp.zeros((terms, *factors[0]), dtype), B=B)

    @classmethod
    def nearest(
        cls, dense: Float[Array, "in out"], *, terms: int = 1, factor_shapes: FactorShapes | None = None
    ) -> Self:
        """Return the sum of `terms` Kronecker products nearest to `dense` in the Frobenius norm.

        The method is that of Van Loan and Pitsianis (1993). It rearranges the entries of `dense` so that each m2 x n2
        block becomes one row. After this, `A (x) B` is the outer product of the entries of A and the entries of B, and
        a sum of k Kronecker products is a matrix of rank k. So the optimum is the truncated SVD of the rearranged
        matrix, whose shape is (m1 n1, m2 n2). This SVD is the main cost.

        In each term, A and B get equal norms, so that training changes both at the same speed. If a term is not needed
        for `dense`, its A is zero, and its B gets the norm of the first term's B (1 if `dense` is zero). So the
        gradient of its A is not zero.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            terms: Number of Kronecker products in the sum, as in `init`.
            factor_shapes: Shapes of the factors, as in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the shapes of the factors or the number of terms are
                not possible for it.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        (m1, n1), (m2, n2) = factors = checked_factors(cls.__name__, factor_shapes, (m, n))
        check_terms(cls.__name__, terms, factors)
        blocks = dense.reshape(m1, m2, n1, n2).transpose(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
        U, S, Vt = jnp.linalg.svd(blocks, full_matrices=False)
        largest = jnp.where(S[0] > 0, S[0], 1)
        rounding = max(blocks.shape) * jnp.finfo(S.dtype).eps * largest
        norm = jnp.sqrt(jnp.where(rounding < S, S, largest))[:terms, None]
        A, B = U[:, :terms].T * S[:terms, None] / norm, Vt[:terms] * norm
        return cls(A=A.reshape(terms, m1, n1), B=B.reshape(terms, m2, n2))

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest number of terms within the budget of parameters, for the default shapes of the factors."""
        (m1, n1), (m2, n2) = near_square_factors(shape)
        terms = largest_size(budget // (m1 * n1 + m2 * n2), min(m1 * n1, m2 * n2))
        return {"terms": terms} if terms else None

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((12, 12))

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the factors A and B of the first two products, and dots if there are more."""
        return sum_pieces(
            self.terms, lambda k: [factor_piece("A", k, self.terms), "\\otimes", factor_piece("B", k, self.terms)]
        )

    @property
    def T(self) -> "Kronecker":
        """The transpose, in which each factor is transposed and the order of the factors stays the same."""
        return Kronecker(A=self.A.swapaxes(-1, -2), B=self.B.swapaxes(-1, -2))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return _multiply_rows(x, self.A, self.B)

    def _dense(self) -> Float[Array, "in out"]:
        return jnp.einsum("kab,kcd->acbd", self.A, self.B, precision=jax.lax.Precision.HIGHEST).reshape(self.shape)

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        A, B = self.A[:, ids // self.B.shape[1]], self.B[:, ids % self.B.shape[1]]
        found = jnp.einsum("k...b,k...d->...bd", A, B, precision=jax.lax.Precision.HIGHEST)
        return found.reshape(*ids.shape, self.shape[1])


def factor_piece(name: str, k: int, terms: int) -> Piece:
    """Return the `Piece` that shows `array[k]` in a picture, the factor of term k in the array of this name.

    Its label is the name of the array, with the index k if the sum has several terms.
    """
    label = name if len(name) == 1 else f"\\mathrm{{{name}}}"
    return Piece(f"{label}_{k}" if terms > 1 else label, {name: (name, k)})


def near_square_factors(shape: tuple[int, int]) -> FactorShapes:
    """Return the shapes of two factors with the fewest parameters `m1 n1 + m2 n2` and, among these, the highest rank.

    The number of parameters is smallest if both factors have about equally many parameters. The largest rank that a
    Kronecker product of these shapes can have is `min(m1, n1) min(m2, n2)`, which is largest if both factors are nearly
    square. Among shapes with equal numbers of parameters and equal ranks, the shapes with the largest m1 are chosen,
    because `x @ M` is then cheaper.

    Args:
        shape: `(in_features, out_features)` of the product.

    Raises:
        UserError: The shape is not two positive integers.

    >>> near_square_factors((768, 768))
    ((32, 24), (24, 32))
    >>> near_square_factors((768, 3072))
    ((32, 48), (24, 64))
    """
    m, n = checked_shape("near_square_factors", shape)

    def merit(factors: FactorShapes) -> tuple[int, ...]:
        (m1, n1), (m2, n2) = factors
        return m1 * n1 + m2 * n2, -min(m1, n1) * min(m2, n2), -m1

    return min((((m1, n1), (m // m1, n // n1)) for m1 in _divisors(m) for n1 in _divisors(n)), key=merit)


def checked_factors(owner: str, factors: Sequence[Sequence[int]] | None, shape: tuple[int, int]) -> FactorShapes:
    """Return the checked shapes of the two factors. If `factors` is None, return `near_square_factors(shape)`.

    Args:
        owner: Name of the calling class, with which the error message begins.
        factors: Shapes `((m1, n1), (m2, n2))` of the factors, or None.
        shape: Shape of the Kronecker product.

    Raises:
        UserError: The factor shapes are not four positive integers, or do not multiply to `shape`.
    """
    if factors is None:
        return near_square_factors(shape)
    try:
        (m1, n1), (m2, n2) = ([operator.index(size) for size in factor] for factor in factors)
    except (TypeError, ValueError):
        m1 = n1 = m2 = n2 = 0
    if min(m1, n1, m2, n2) < 1:
        raise UserError(f"{owner}: factors must be ((m1, n1), (m2, n2)), four positive integers, not {factors!r}")
    if (m1 * m2, n1 * n2) != tuple(shape):
        (a, b), (c, d) = near_square_factors(shape)
        raise UserError(
            f"{owner}: factors of {m1} x {n1} and {m2} x {n2} multiply to {m1 * m2} x {n1 * n2}, but the shape is "
            f"{shape[0]} x {shape[1]}; {a} x {b} and {c} x {d} would fit"
        )
    return (m1, n1), (m2, n2)


def check_terms(owner: str, terms: int, factors: FactorShapes) -> None:
    """Check that a sum of Kronecker products has at least 1 term and at most min(m1 n1, m2 n2) terms.

    Every matrix is a sum of min(m1 n1, m2 n2) such products, so more terms would be redundant.

    Raises:
        UserError: The number of terms is outside this range or is not an integer.
    """
    (m1, n1), (m2, n2) = factors
    most = min(m1 * n1, m2 * n2)
    if not isinstance(terms, int) or not 1 <= terms <= most:
        raise UserError(
            f"{owner}: {most} terms of {m1} x {n1} (x) {m2} x {n2} reach every matrix, so terms must be from 1 to "
            f"{most}, not {terms!r}"
        )


@batch_local
def _multiply_rows(
    x: Float[Array, "*batch in"], A: Float[Array, "k m1 n1"], B: Float[Array, "k m2 n2"]
) -> Float[Array, "*batch out"]:
    """Return `sum_k A_k^T X B_k` for each row of x, where X is the row reshaped to an m1 x m2 matrix.

    It takes two products of two-dimensional arrays. In each of them, one operand holds all rows of x. The second
    product also computes the sum over k. So the gradients are products of two-dimensional arrays too, and the gradients
    of A and B sum over all rows. Between the two products the intermediate array is transposed, but its first axis, the
    rows of x, stays in place. `jnp.einsum` would take about twice the time and memory on CPUs.
    """
    k, m1, n1 = A.shape
    _, m2, n2 = B.shape
    rows = math.prod(x.shape[:-1])
    X = x.reshape(rows, m1, m2)
    if n1 * m2 * (m1 + n2) <= m1 * n2 * (m2 + n1):
        H = X.swapaxes(1, 2).reshape(rows * m2, m1) @ A.swapaxes(0, 1).reshape(m1, k * n1)
        H = H.reshape(rows, m2, k, n1).transpose(0, 3, 2, 1).reshape(rows * n1, k * m2)
        y = H @ B.reshape(k * m2, n2)
    else:
        H = X.reshape(rows * m1, m2) @ B.swapaxes(0, 1).reshape(m2, k * n2)
        H = H.reshape(rows, m1, k, n2).transpose(0, 3, 2, 1).reshape(rows * n2, k * m1)
        y = (H @ A.reshape(k * m1, n1)).reshape(rows, n2, n1).swapaxes(1, 2)
    return y.reshape(*x.shape[:-1], n1 * n2)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
