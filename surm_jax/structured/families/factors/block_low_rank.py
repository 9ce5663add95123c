"""Grids of blocks of low rank, which GraLoRA (arXiv 2505.20355) adds to kernels."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import TIMES, Piece, checked_shape
from surm_jax.structured.families.base import TwoFactors, check_rank, checked_dense, family, scaled_normal


@family
class BlockLowRank(TwoFactors):
    """Grid of N x N blocks, in which the block of row k and column b is `down[k, b] @ up[k, b]`, of rank r / N.

    The matrix has r (in + out) parameters, as many as a matrix of rank r, and x @ M takes as many multiplications. Its
    rank can be up to N r. N must divide r, in_features and out_features, as in GraLoRA.

    Attributes:
        down: (N, N, in_features / N, r / N), the left matrices of all blocks. They are random when training starts.
        up: (N, N, r / N, out_features / N), the right matrices of all blocks. They are zero when training starts.

    >>> down = jnp.array([[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]])
    >>> BlockLowRank(down=down, up=jnp.tile(jnp.array([1.0, 10.0]), (2, 2, 1, 1))).to_dense()
    Array([[ 1., 10.,  2., 20.],
           [ 3., 30.,  4., 40.]], dtype=float32)
    """

    option_names = ("rank", "blocks")

    down: Float[Array, "N N p q"]
    up: Float[Array, "N N q s"]

    def __post_init__(self) -> None:
        if self.down is None and self.up is None:
            return
        self._check_dimensions(down="(N, N, in_features / N, r / N)", up="(N, N, r / N, out_features / N)")
        N, q = self.blocks, self.down.shape[-1]
        self._check_leaf("down", (N, N, self.down.shape[-2], q))
        self._check_leaf("up", (N, N, q, self.up.shape[-1]))
        _check_sizes(self.shape, self.rank, self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        return self.blocks * self.down.shape[-2], self.blocks * self.up.shape[-1]

    @property
    def rank(self) -> int:
        """The number r of GraLoRA. Each block has the rank r / N."""
        return self.blocks * self.down.shape[-1]

    @property
    def blocks(self) -> int:
        """The number N of blocks in each row and each column of the grid."""
        return self.down.shape[-4]

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
        """Return the matrix with which training starts: it is zero, with `up = 0` and `down = scale * N(0, 1)`.

        Args:
            key: Random key for `down`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `down`.
            rank: The number r. The rank r / N of a block must be at most min(in_features, out_features) / N.
            blocks: The number N. It must divide `rank`, in_features and out_features. The default is 2, as in GraLoRA,
                or 1 if 2 does not divide these numbers.
            dtype: Dtype of both arrays.

        Raises:
            UserError: The shape is not two positive integers, or the rank or the number of blocks is not possible.
        """
        m, n = checked_shape(cls.__name__, shape)
        N = _checked_blocks((m, n), rank, blocks)
        down = scaled_normal(key, (N, N, m // N, rank // N), scale, dtype)
        return cls(down=down, up=jnp.zeros((N, N, rank // N, n // N), dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, rank: int, blocks: int | None = None) -> Self:
        """Return the matrix of this family nearest to `dense` in the Frobenius norm: the truncated SVD of every block.

        `down` holds singular vectors, and `up` also holds the singular values.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            rank: The number r, as in `init`.
            blocks: The number N, as in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the rank or the number of blocks is not possible.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        N = _checked_blocks((m, n), rank, blocks)
        grid = dense.reshape(N, m // N, N, n // N).swapaxes(1, 2)
        U, S, Vt = jnp.linalg.svd(grid, full_matrices=False)
        kept = rank // N
        return cls(down=U[..., :kept], up=S[..., :kept, None] * Vt[..., :kept, :])

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: rank 2 in 2 x 2 blocks."""
        return ({"rank": min(2, *shape)},)

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((8, 12), rank=2, blocks=2)

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the factors of the first block, and dots if there are more blocks."""
        down, up = (
            Piece("\\mathrm{down}_{11}", {"down": ("down", (0, 0))}),
            Piece("\\mathrm{up}_{11}", {"up": ("up", (0, 0))}),
        )
        return [down, TIMES, up, *["\\cdots"] * (self.blocks > 1)]

    @property
    def T(self) -> "BlockLowRank":
        """The transpose: the grid and every block in it are transposed."""
        return BlockLowRank(down=self.up.transpose(1, 0, 3, 2), up=self.down.transpose(1, 0, 3, 2))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        m, n = self.shape
        inner = jnp.einsum("...kp,kbpq->...kbq", x.reshape(*x.shape[:-1], self.blocks, m // self.blocks), self.down)
        return jnp.einsum("...kbq,kbqs->...bs", inner, self.up).reshape(*x.shape[:-1], n)

    def _dense(self) -> Float[Array, "in out"]:
        grid = jnp.matmul(self.down, self.up, precision=jax.lax.Precision.HIGHEST)
        return grid.swapaxes(1, 2).reshape(self.shape)


def _checked_blocks(shape: tuple[int, int], rank: int, blocks: int | None) -> int:
    """Return the checked number of blocks. The default is 2 if that is possible, otherwise 1."""
    if blocks is None:
        blocks = 1 if any(isinstance(size, int) and size % 2 for size in (*shape, rank)) else 2
    _check_sizes(shape, rank, blocks)
    return blocks


def _check_sizes(shape: tuple[int, int], rank: int, blocks: int) -> None:
    m, n = shape
    check_rank("BlockLowRank", rank, shape)
    if not isinstance(blocks, int) or blocks < 1 or m % blocks or n % blocks or rank % blocks:
        raise UserError(f"BlockLowRank: the number of blocks must divide {m}, {n} and the rank {rank}, not {blocks!r}")
