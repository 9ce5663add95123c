"""Matrices of low rank, which LoRA (arXiv 2106.09685) adds to kernels. The other families are compared with them."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.structured.base import TIMES, Piece, checked_shape
from surm_jax.structured.families.base import TwoFactors, check_rank, checked_dense, family, scaled_normal


@family
class LowRank(TwoFactors):
    """Matrix of rank at most r, `M = down @ up`, which is the transpose of `W = A B^T` in arXiv 2406.17740.

    It has r (in + out) parameters. `x @ M` is computed as `(x @ down) @ up` and takes r (in + out) multiplications per
    row of x. `down` is called `B` in the paper and `lora_a` in Flax. `up` is called `A^T` in the paper and `lora_b` in
    Flax.

    Attributes:
        down: (in_features, r). It is random when training starts.
        up: (r, out_features). It is zero when training starts.

    >>> LowRank(down=jnp.array([[1.0], [10.0]]), up=jnp.array([[1.0, 2.0, 3.0]])).to_dense()
    Array([[ 1.,  2.,  3.],
           [10., 20., 30.]], dtype=float32)
    """

    option_names = ("rank",)

    down: Float[Array, "in r"]
    up: Float[Array, "r out"]

    def __post_init__(self) -> None:
        if self.down is None and self.up is None:
            return
        self._check_dimensions(down="(in_features, r)", up="(r, out_features)")
        self._check_leaf("down", (self.shape[0], self.rank))
        self._check_leaf("up", (self.rank, self.shape[1]))
        check_rank("LowRank", self.rank, self.shape)

    @property
    def small_residuals(self) -> bool:
        """True, because the backward pass needs only `x` and the small array `x @ down`."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        return self.down.shape[-2], self.up.shape[-1]

    @property
    def rank(self) -> int:
        """The number r of columns of `down`, which is the largest possible rank of `M`."""
        return self.down.shape[-1]

    @classmethod
    def init(
        cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, rank: int, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """Return the matrix with which training starts: it is zero, with `up = 0` and `down = scale * N(0, 1)`.

        If both arrays were zero, both gradients would be zero too, and training could not change them.

        Args:
            key: Random key for `down`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `down`.
            rank: Number of columns of `down`, from 1 to min(in_features, out_features).
            dtype: Dtype of both arrays.

        Raises:
            UserError: The shape is not two positive integers, or the rank is not possible for it.
        """
        m, n = checked_shape(cls.__name__, shape)
        check_rank("LowRank", rank, (m, n))
        return cls(down=scaled_normal(key, (m, rank), scale, dtype), up=jnp.zeros((rank, n), dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, rank: int) -> Self:
        """Return the matrix of rank at most `rank` that is nearest to `dense` in the Frobenius norm.

        It is the truncated SVD (Eckart and Young, 1936). With `dense = U S V^T`, `down` consists of the leading columns
        of U, and `up` of the leading rows of S V^T. No column of `down` is zero. So, if the rank of `dense` is lower
        than `rank`, the gradients of the zero rows of `up` are not zero. The SVD takes O(m n min(m, n)) operations.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            rank: Number of columns of `down`, from 1 to min(in_features, out_features).

        Raises:
            UserError: `dense` is not a floating-point matrix, or the rank is not possible for it.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        check_rank("LowRank", rank, (m, n))
        U, S, Vt = jnp.linalg.svd(dense, full_matrices=False)
        return cls(down=U[:, :rank], up=S[:rank, None] * Vt[:rank])

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: rank 1."""
        del shape
        return ({"rank": 1},)

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((8, 6), rank=1)

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: `down` and `up`, with a multiplication sign between them."""
        return [Piece("\\mathrm{down}", {"down": ("down", ...)}), TIMES, Piece("\\mathrm{up}", {"up": ("up", ...)})]

    @property
    def T(self) -> "LowRank":
        """The transpose `up^T @ down^T`, with `up^T` as its `down` and `down^T` as its `up`."""
        return LowRank(down=self.up.swapaxes(-1, -2), up=self.down.swapaxes(-1, -2))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return (x @ self.down) @ self.up

    def _dense(self) -> Float[Array, "in out"]:
        return jnp.matmul(self.down, self.up, precision=jax.lax.Precision.HIGHEST)

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return jnp.matmul(self.down[ids], self.up, precision=jax.lax.Precision.HIGHEST)
