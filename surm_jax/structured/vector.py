"""What the families have in common that are linear in one vector, such as circulant and Toeplitz matrices."""

from typing import Self

import jax.numpy as jnp
from jaxtyping import DTypeLike, PRNGKeyArray

from surm_jax.structured.base import StructuredMatrix, checked_shape


class LinearInVector(StructuredMatrix):
    """Base of the families that declare one array, a vector, and then `shape`, and are linear in the vector."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        self._check_leaf(self._leaf_names[0], (self._length(self.shape),))

    @staticmethod
    def _length(shape: tuple[int, int]) -> int:
        """How many numbers a matrix of this shape needs: N = max(in, out)."""
        return max(shape)

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """The zero matrix. It is linear in its vector, which learns from zero: `key` and `scale` change nothing.

        Args:
            key: Unused.
            shape: `(in_features, out_features)`.
            scale: Unused.
            dtype: Type of the vector.

        Raises:
            UserError: The shape is not two positive integers.
        """
        shape = checked_shape(cls.__name__, shape)
        return cls(jnp.zeros(cls._length(shape), dtype), shape=shape)
