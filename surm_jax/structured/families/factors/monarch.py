"""Monarch matrices: two block-diagonal matrices with a permutation after each.

Monarch matrices come from arXiv 2204.00595. MoRe (arXiv 2408.17383) adds Monarch matrices with narrow blocks to
kernels.

The papers write `W x`. Here `y = x @ M` with `M = W^T`, so the blocks of both factors are transposes of the blocks in
the papers. The number of blocks must divide in_features and out_features, as in the released code of MoRe.
"""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import TIMES, Piece, checked_shape, static
from surm_jax.structured.families.base import TwoFactors, check_rank, checked_dense, family, scaled_normal

_MOST_DEFAULT_BLOCKS = 4  # MoRe uses 4 blocks in its experiments.


@family
class Monarch(TwoFactors):
    """Monarch matrix `M = diag(R_1, ..., R_N) P diag(L_1, ..., L_N) P'` with N blocks of inner width r in each factor.

    The first factor computes N r inner features. The permutation P deals them out to the blocks of the second factor
    like cards: inner feature t goes to block `t mod N`. P' interleaves the outputs of the blocks: output s of block b
    becomes output `s N + b` of the matrix.

    The matrix has r (in + out) parameters, and x @ M takes r (in + out) multiplications per row of x. Both numbers are
    those of a matrix of rank r, but the rank of a Monarch matrix can be up to min(in, out, N r).

    Divide the rows into N blocks of neighbouring rows, and divide the columns into N groups by their index modulo N.
    The submatrix of row block k and column group b has low rank. Its rank is the number of inner features t with
    `t // r = k` and `t mod N = b`, which is r / N if N divides r.

    Attributes:
        R: (N, in_features / N, r), the blocks that multiply x. They are random when training starts.
        L: (N, r, out_features / N), the blocks of the second factor. They are zero when training starts.
        transposed: Whether this is the transpose of the matrix that the formula gives. Then in_features and
            out_features change places in the shapes of R and L.

    >>> R, L = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]), jnp.array([[[1.0, 5.0]], [[2.0, 6.0]]])
    >>> Monarch(R, L).to_dense()
    Array([[ 1.,  0.,  5.,  0.],
           [ 2.,  0., 10.,  0.],
           [ 0.,  6.,  0., 18.],
           [ 0.,  8.,  0., 24.]], dtype=float32)
    """

    option_names = ("rank", "blocks")

    R: Float[Array, "N p r"]
    L: Float[Array, "N r s"]
    transposed: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.R is None and self.L is None:
            return
        self._check_dimensions(R="(N, in_features / N, r)", L="(N, r, out_features / N)")
        self._check_leaf("R", (self.blocks, self.R.shape[-2], self.rank))
        self._check_leaf("L", (self.blocks, self.rank, self.L.shape[-1]))
        _check_sizes(self.shape, self.rank, self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        m, n = self.blocks * self.R.shape[-2], self.blocks * self.L.shape[-1]
        return (n, m) if self.transposed else (m, n)

    @property
    def rank(self) -> int:
        """The inner width r of all blocks."""
        return self.R.shape[-1]

    @property
    def blocks(self) -> int:
        """The number N of blocks in each factor."""
        return self.R.shape[-3]

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        *,
        scale: float,
        rank: int,
        blocks: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Return the matrix with which training starts: it is zero, with `L = 0` and `R = scale * N(0, 1)`.

        Args:
            key: Random key for `R`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `R`.
            rank: Inner width r of the blocks, from 1 to min(in_features, out_features).
            blocks: Number N of blocks in each factor. It must divide in_features and out_features. The default is the
                largest such number up to 4.
            dtype: Dtype of both arrays.

        Raises:
            UserError: The shape is not two positive integers, or the rank or the number of blocks is not possible.
        """
        m, n = checked_shape(cls.__name__, shape)
        blocks = _default_blocks((m, n)) if blocks is None else blocks
        _check_sizes((m, n), rank, blocks)
        R = scaled_normal(key, (blocks, m // blocks, rank), scale, dtype)
        return cls(R=R, L=jnp.zeros((blocks, rank, n // blocks), dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, rank: int, blocks: int | None = None) -> Self:
        """Return the Monarch matrix nearest to `dense` in the Frobenius norm.

        Each inner feature t contributes to only one submatrix (see the class). So the submatrices are independent, and
        the truncated SVD of each submatrix gives the optimum (arXiv 2204.00595, section 3.3). The columns of R are
        singular vectors, and L also holds the singular values. The SVDs take O(m n min(m, n) / N) operations.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            rank: Inner width of the blocks, as in `init`.
            blocks: Number of blocks in each factor, as in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the rank or the number of blocks is not possible.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        N = _default_blocks((m, n)) if blocks is None else blocks
        _check_sizes((m, n), rank, N)
        # The shape of `grid` is (N, N, m / N, n / N): the block of rows, the group of columns, the row, the column.
        grid = dense.reshape(N, m // N, n // N, N).transpose(0, 3, 1, 2)
        U, S, Vt = jnp.linalg.svd(grid, full_matrices=False)
        t = np.arange(N * rank)
        # The inner features of submatrix (k, b) are N apart, and `which` counts them.
        k, b, which = t // rank, t % N, t % rank // N
        columns, rows = U[k, b, :, which], S[k, b, which, None] * Vt[k, b, which]
        return cls(
            R=columns.reshape(N, rank, m // N).swapaxes(1, 2),
            L=rows.reshape(rank, N, n // N).swapaxes(0, 1),
        )

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: rank 1, and rank 4 as MoRe."""
        return ({"rank": 1}, {"rank": min(4, *shape)})

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((8, 12), rank=2, blocks=2)

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the first block of each factor, and dots if there are more."""
        dots = ["\\cdots"] * (self.blocks > 1)
        R, L = Piece("R_1", {"R": ("R", 0)}), Piece("L_1", {"L": ("L", 0)})
        return [R, *dots, TIMES, L, *dots]

    @property
    def T(self) -> "Monarch":
        """The transpose, with the same arrays and the other value of `transposed`."""
        return Monarch(R=self.R, L=self.L, transposed=not self.transposed)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        N, r, batch, (m, n) = self.blocks, self.rank, x.shape[:-1], self.shape
        # The inner features are ordered as (block of R, r) for R, and as (r, block of L) for L.
        if self.transposed:
            inner = jnp.einsum("...sb,bqs->...qb", x.reshape(*batch, m // N, N), self.L)
            return jnp.einsum("...kq,kpq->...kp", inner.reshape(*batch, N, r), self.R).reshape(*batch, n)
        inner = jnp.einsum("...kp,kpq->...kq", x.reshape(*batch, N, m // N), self.R)
        return jnp.einsum("...qb,bqs->...sb", inner.reshape(*batch, r, N), self.L).reshape(*batch, n)

    def _dense(self) -> Float[Array, "in out"]:
        with jax.default_matmul_precision("highest"):
            return self._apply(jnp.eye(self.shape[0], dtype=self.R.dtype))


def _default_blocks(shape: tuple[int, int]) -> int:
    """Return the largest number up to 4 that divides both sizes."""
    common = math.gcd(*shape)
    return next(blocks for blocks in range(_MOST_DEFAULT_BLOCKS, 0, -1) if common % blocks == 0)


def _check_sizes(shape: tuple[int, int], rank: int, blocks: int) -> None:
    m, n = shape
    if not isinstance(blocks, int) or blocks < 1 or m % blocks or n % blocks:
        raise UserError(f"Monarch: the number of blocks must divide {m} and {n}, but {blocks!r} was asked for")
    check_rank("Monarch", rank, shape)
