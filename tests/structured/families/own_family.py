"""A matrix family of a user: one file outside the package."""

from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.structured import Family, checked_dense, checked_shape, family, static


@family
class Banded(Family):
    """Constant main diagonal and constant diagonals above it: `M[i, j] = d[j - i]` if 0 <= j - i < bands.

    Attributes:
        d: (bands,), the numbers of the diagonals.
        shape: `(in_features, out_features)`.
        bands: How many diagonals there are.
        lower: Whether this is the transpose.
    """

    option_names = ("bands",)

    d: Float[Array, " bands"]
    shape: tuple[int, int] = static()
    bands: int = static()
    lower: bool = static(default=False)

    def __post_init__(self) -> None:
        self._check_leaf("d", (self.bands,))

    @classmethod
    def init(cls, key: Any, shape: Any, *, scale: float, bands: int = 2, dtype: Any = jnp.float32) -> Self:
        """Return the zero matrix, which is linear in `d`."""
        return cls(jnp.zeros(bands, dtype), checked_shape(cls.__name__, shape), bands)

    @classmethod
    def nearest(cls, dense: Any, *, bands: int = 2) -> Self:
        """Return the matrix whose diagonals are the means of the target's diagonals."""
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        means = [jnp.mean(jnp.diagonal(dense, k)) if k < n else jnp.zeros((), dense.dtype) for k in range(bands)]
        return cls(jnp.stack(means), (m, n), bands)

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return as many diagonals as the budget and the matrix allow."""
        return {"bands": min(budget, shape[1])} if budget >= 1 else None

    @property
    def T(self) -> "Banded":
        """The transpose: the same numbers below the main diagonal."""
        return Banded(self.d, self.shape[::-1], self.bands, not self.lower)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return jnp.matmul(x, self._dense(), precision="highest")

    def _dense(self) -> Float[Array, "in out"]:
        m, n = self.shape[::-1] if self.lower else self.shape
        M = sum(self.d[k] * jnp.eye(m, n, k, dtype=self.d.dtype) for k in range(self.bands))
        return M.T if self.lower else M
