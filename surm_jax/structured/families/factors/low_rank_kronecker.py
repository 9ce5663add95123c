"""Sums of Kronecker products whose second factors have low rank, for LoKr, Compacter and KAdaptation.

LoKr (arXiv 2309.14859) uses one Kronecker product `A (x) B`, in which B has a chosen rank. The parameterised
hypercomplex layers of Compacter (arXiv 2106.04647) and KAdaptation (arXiv 2203.16329) use sums of k products, in which
A is k x k and B has rank 1. These papers write `W x`. Here `y = x @ M` with `M = W^T`, so each factor is the transpose
of the factor in the papers, as in `Kronecker`.

Matrices may be rectangular. As in `Kronecker`, the shapes of the factors multiply to the shape of the matrix, and
nothing is padded.
"""

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.structured.base import TIMES, Piece, StructuredMatrix, checked_shape, sum_pieces
from surm_jax.structured.families.base import Family, check_rank, checked_dense, family, largest_size, scaled_normal
from surm_jax.structured.families.factors.kronecker import (
    FactorShapes,
    Kronecker,
    check_terms,
    checked_factors,
    factor_piece,
    near_square_factors,
)
from surm_jax.structured.fit import refine


@family
class LowRankKronecker(Family):
    """Sum of k Kronecker products, `M = sum_k A_k (x) (down_k up_k)`, whose second factors have rank at most r.

    It has k (m1 n1 + r (m2 + n2)) parameters. The product `x @ M` first computes the matrices `B_k = down_k up_k`, once
    for all rows of x. Then each row costs as much as with `Kronecker`. The rank of one Kronecker product is at most the
    rank of `A_k` times r.

    Attributes:
        A: (k, m1, n1), the first factors of all products. It is zero when training starts.
        down: (k, m2, r), the left matrices in the second factors. It is random when training starts.
        up: (k, r, n2), the right matrices in the second factors. It is random when training starts.

    >>> down, up = jnp.array([[[1.0], [10.0]]]), jnp.array([[[1.0, 3.0]]])
    >>> M = LowRankKronecker(A=jnp.array([[[1.0, 2.0]]]), down=down, up=up)
    >>> M.to_dense()
    Array([[ 1.,  3.,  2.,  6.],
           [10., 30., 20., 60.]], dtype=float32)
    """

    option_names = ("rank", "terms", "factor_shapes")
    searches = True
    _title = "low-rank Kronecker"

    A: Float[Array, "k m1 n1"]
    down: Float[Array, "k m2 r"]
    up: Float[Array, "k r n2"]

    def __post_init__(self) -> None:
        if self.A is None and self.down is None and self.up is None:
            return
        self._check_dimensions(A="(k, m1, n1)", down="(k, m2, r)", up="(k, r, n2)")
        m2, n2 = self.factor_shapes[1]
        self._check_leaf("A", (self.terms, *self.factor_shapes[0]))
        self._check_leaf("down", (self.terms, m2, self.rank))
        self._check_leaf("up", (self.terms, self.rank, n2))
        check_terms("LowRankKronecker", self.terms, self.factor_shapes)
        check_rank("LowRankKronecker", self.rank, self.factor_shapes[1])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        (m1, n1), (m2, n2) = self.factor_shapes
        return m1 * m2, n1 * n2

    @property
    def factor_shapes(self) -> FactorShapes:
        """The shapes `(m1, n1), (m2, n2)` of the factors `A_k` and `down_k up_k`."""
        m1, n1 = self.A.shape[-2:]
        return (m1, n1), (self.down.shape[-2], self.up.shape[-1])

    @property
    def terms(self) -> int:
        """The number k of Kronecker products that are summed."""
        return self.A.shape[-3]

    @property
    def rank(self) -> int:
        """The number r of columns of `down_k`, which is the largest possible rank of the second factors."""
        return self.down.shape[-1]

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        *,
        scale: float,
        rank: int,
        terms: int = 1,
        factor_shapes: FactorShapes | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Return the matrix with which training starts: it is zero, with `A = 0` and random `down` and `up`.

        `down` and `up` are drawn from `scale * N(0, 1)`, so an entry of `down_k up_k` has the standard deviation
        `scale^2 sqrt(rank)`. If two of the three arrays were zero, all gradients would be zero too, and training could
        not change any of them.

        Args:
            key: Random key for `down` and `up`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `down` and of `up`.
            rank: Largest rank of the second factors, from 1 to min(m2, n2).
            terms: Number of Kronecker products in the sum, from 1 to min(m1 n1, m2 n2).
            factor_shapes: Shapes `((m1, n1), (m2, n2))` of the factors, with m1 m2 = in_features and n1 n2 =
                out_features. The default is `near_square_factors(shape)`.
            dtype: Dtype of all three arrays.

        Raises:
            UserError: The shape is not two positive integers, or the shapes of the factors, the number of terms or the
                rank are not possible for it.
        """
        (m1, n1), (m2, n2) = _checked_sizes(checked_shape(cls.__name__, shape), rank, terms, factor_shapes)
        draw_down, draw_up = jax.random.split(key)
        return cls(
            A=jnp.zeros((terms, m1, n1), dtype),
            down=scaled_normal(draw_down, (terms, m2, rank), scale, dtype),
            up=scaled_normal(draw_up, (terms, rank, n2), scale, dtype),
        )

    @classmethod
    def nearest(
        cls,
        dense: Float[Array, "in out"],
        *,
        rank: int,
        terms: int = 1,
        factor_shapes: FactorShapes | None = None,
        steps: int = 200,
        progress: bool = False,
    ) -> Self:
        """Return a matrix of this family near to `dense` in the Frobenius norm, found by a search.

        The nearest matrix has no closed form. The search `surm_jax.structured.refine` starts from the result of
        `Kronecker.nearest`, in which every B is replaced by its truncated SVD. This start is already the optimum if the
        rank is min(m2, n2), or if `dense` is a single Kronecker product whose B has at most this rank. The result is
        never further from `dense` than the start, nor than the zero matrix.

        In each term of the start, A and B have equal norms, and `down` and `up` have equal norms. If a term is not
        needed for `dense`, its A is zero. If a singular direction of its B is not needed, the corresponding row of `up`
        is zero. The other arrays are not zero there, so the zero entries have non-zero gradients.

        The SVD takes O(m n min(m1 n1, m2 n2)) operations, and each step takes O(m n terms).

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            rank: Largest rank of the second factors, as in `init`.
            terms: Number of Kronecker products in the sum, as in `init`.
            factor_shapes: Shapes of the factors, as in `init`.
            steps: Largest number of steps of the search.
            progress: Whether to show a progress bar.

        Raises:
            UserError: `dense` is not a floating-point matrix or holds numbers that are not finite, or the shapes of the
                factors, the number of terms, the rank or the number of steps is not possible.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        factors = _checked_sizes((m, n), rank, terms, factor_shapes)
        # The search works on the target divided by its largest entry, because A, down and up scale with different
        # powers of the size of the target.
        unit = jnp.max(jnp.abs(dense))
        unit = jnp.where(unit > 0, unit, 1)
        start = _truncated(Kronecker.nearest(dense / unit, terms=terms, factor_shapes=factors), rank)
        found = refine(start, dense / unit, steps=steps, progress=progress)
        half, quarter = jnp.sqrt(unit), jnp.sqrt(jnp.sqrt(unit))
        return cls(A=half * found.A, down=quarter * found.down, up=quarter * found.up)

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest rank with which one Kronecker product of default factor shapes stays within the budget."""
        (m1, n1), (m2, n2) = near_square_factors(shape)
        rank = largest_size((budget - m1 * n1) // (m2 + n2), min(m2, n2))
        return {"rank": rank} if rank else None

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: one term of rank 1."""
        del shape
        return ({"rank": 1},)

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((8, 8), rank=1, factor_shapes=((2, 2), (4, 4)))

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the factors of the first two products, and dots if there are more."""

        def term(k: int) -> list[Piece | str]:
            A, down, up = (factor_piece(name, k, self.terms) for name in ("A", "down", "up"))
            return [A, "\\otimes\\,(", down, TIMES, up, ")"]

        return sum_pieces(self.terms, term)

    @property
    def T(self) -> "LowRankKronecker":
        """The transpose, with `A_k^T` as its `A_k`, `up_k^T` as its `down_k` and `down_k^T` as its `up_k`."""
        return LowRankKronecker(A=self.A.swapaxes(-1, -2), down=self.up.swapaxes(-1, -2), up=self.down.swapaxes(-1, -2))

    def compact(self) -> StructuredMatrix:
        """Return an equal `Kronecker` with `B_k = down_k up_k` if it has fewer parameters, otherwise this matrix."""
        m2, n2 = self.factor_shapes[1]
        return self._astype(self._compute_dtype())._kronecker() if m2 * n2 < self.rank * (m2 + n2) else self

    def _kronecker(self) -> Kronecker:
        return Kronecker(A=self.A, B=jnp.matmul(self.down, self.up, precision=jax.lax.Precision.HIGHEST))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self._kronecker()._apply(x)

    def _dense(self) -> Float[Array, "in out"]:
        return self._kronecker()._dense()

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return self._kronecker()._rows(ids)


def _checked_sizes(shape: tuple[int, int], rank: int, terms: int, factor_shapes: FactorShapes | None) -> FactorShapes:
    factors = checked_factors("LowRankKronecker", factor_shapes, shape)
    check_terms("LowRankKronecker", terms, factors)
    check_rank("LowRankKronecker", rank, factors[1])
    return factors


@functools.partial(jax.jit, static_argnames="rank")
def _truncated(matrix: Kronecker, rank: int) -> LowRankKronecker:
    """Replace every B of a matrix by the nearest `down @ up` of this rank, with factors of equal norm."""
    U, S, Vt = jnp.linalg.svd(matrix.B, full_matrices=False)
    largest = S[:, :1]  # never zero, because `Kronecker.nearest` returns no zero B
    empty = max(matrix.B.shape[1:]) * jnp.finfo(S.dtype).eps * largest >= S
    norm = jnp.sqrt(jnp.where(empty, largest, S))[:, None, :rank]
    up = Vt[:, :rank] * (S[:, None, :rank] / norm).swapaxes(1, 2)
    return LowRankKronecker(A=matrix.A, down=U[..., :rank] * norm, up=up)
