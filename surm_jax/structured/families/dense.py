"""Dense matrices without structure. Bottleneck adapters use them, and the other families are compared with them."""

from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import checked_shape
from surm_jax.structured.families.base import Family, checked_dense, family


@family
class Dense(Family):
    """Any matrix. It has in * out parameters, and `x @ M` takes in * out multiplications per row of x.

    Attributes:
        W: (in_features, out_features), the matrix itself. It is zero when training starts.

    >>> Dense(jnp.array([[1.0, 2.0, 3.0]])).shape
    (1, 3)
    """

    W: Float[Array, "in out"]

    def __post_init__(self) -> None:
        if self.W is None:
            return
        shape = getattr(self.W, "shape", None)
        if shape is None or len(shape) != 2:
            raise UserError(f"Dense: W must be an array of shape (in_features, out_features), not {shape or self.W!r}")
        self._check_leaf("W", tuple(shape))

    @property
    def small_residuals(self) -> bool:
        """True, because the backward pass needs only `x`."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        m, n = self.W.shape[-2:]
        return m, n

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the zero matrix, with which training starts.

        No array is random. The matrix is `W` itself, so the gradient of `W` is not zero at the start.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            dtype: Dtype of `W`.

        Raises:
            UserError: The shape is not two positive integers.
        """
        return cls(jnp.zeros(checked_shape(cls.__name__, shape), dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return `dense` itself, in float32 or float64, because every matrix belongs to this family.

        Args:
            dense: The matrix to store, (in_features, out_features).

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        return cls(checked_dense(cls.__name__, dense))

    @property
    def T(self) -> "Dense":
        """The transpose, which stores the transposed `W`."""
        return Dense(self.W.swapaxes(-1, -2))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return jnp.matmul(x, self.W, precision=jax.lax.Precision.HIGHEST)

    def _dense(self) -> Float[Array, "in out"]:
        return self.W

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return self.W[ids]
