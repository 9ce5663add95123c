"""Low rank, the update of LoRA (arXiv 2106.09685): the baseline that the other families are measured against."""

from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix, checked_dense, checked_shape, family, scaled_normal


@family("low_rank")
class LowRank(StructuredMatrix):
    """Matrix of rank at most r, `M = B A^T`; the paper (arXiv 2406.17740) writes its transpose, `W = A B^T`.

    `x @ M = (x @ B) @ A^T`: r (in + out) numbers, and as many multiplications a row. With `lora_A` (in, r) and `lora_B`
    (r, out) as in Flax and other libraries, `B = lora_A` and `A = lora_B^T`: the names are the paper's.

    Attributes:
        A: (out_features, r); zero at the start.
        B: (in_features, r); random at the start.

    >>> LowRank(A=jnp.array([[1.0], [2.0], [3.0]]), B=jnp.array([[1.0], [10.0]])).to_dense()
    Array([[ 1.,  2.,  3.],
           [10., 20., 30.]], dtype=float32)
    """

    lean = True

    A: Float[Array, "out r"]
    B: Float[Array, "in r"]

    def __post_init__(self) -> None:
        if self.A is None and self.B is None:
            return
        self._check_dimensions(A="(out_features, r)", B="(in_features, r)")
        self._check_leaf("A", (self.shape[1], self.rank))
        self._check_leaf("B", (self.shape[0], self.rank))
        _check_rank(self.rank, self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """`(in_features, out_features)`."""
        return self.B.shape[-2], self.A.shape[-2]

    @property
    def rank(self) -> int:
        """The number r of columns of both factors."""
        return self.A.shape[-1]

    @classmethod
    def init(
        cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, rank: int, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """The zero matrix: `A = 0` and `B = scale * N(0, 1)`. With both at zero nothing would ever learn.

        Args:
            key: Draws `B`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `B`.
            rank: Columns of both factors, from 1 to the smaller of the two sizes.
            dtype: Type of both factors.

        Raises:
            UserError: The shape is not two positive integers, or the rank is not possible for it.
        """
        m, n = checked_shape(cls.__name__, shape)
        _check_rank(rank, (m, n))
        return cls(A=jnp.zeros((n, rank), dtype), B=scaled_normal(key, (m, rank), scale, dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, rank: int) -> Self:
        """The matrix of rank at most `rank` nearest to `dense` in the Frobenius norm: the truncated SVD.

        Eckart and Young (1936). Of `dense = U S V^T`, `B` gets the leading columns of U and `A` those of V S. As at the
        start of training, `B` is never zero, so that directions which the target leaves empty can still learn. O(m n
        min(m, n)).

        Args:
            dense: (in_features, out_features).
            rank: From 1 to the smaller of the two sizes.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the rank is not possible for it.
        """
        dense = checked_dense(cls.__name__, dense)
        _check_rank(rank, dense.shape)
        U, S, Vt = jnp.linalg.svd(dense, full_matrices=False)
        return cls(A=Vt[:rank].T * S[None, :rank], B=U[:, :rank])

    @property
    def T(self) -> "LowRank":
        """The transpose: the factors change places."""
        return LowRank(A=self.B, B=self.A)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return (x @ self.B) @ self.A.T

    def _dense(self) -> Float[Array, "in out"]:
        return jnp.matmul(self.B, self.A.T, precision=jax.lax.Precision.HIGHEST)


def _check_rank(rank: int, shape: tuple[int, int]) -> None:
    m, n = shape
    if not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise UserError(f"LowRank: a {m} x {n} matrix has a rank from 1 to {min(m, n)}, but {rank!r} was asked for")
