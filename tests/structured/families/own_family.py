"""A family of structured matrices that a user defines in one file outside the package."""

from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.structured import Family, checked_dense, checked_shape, family, static


@family
class Banded(Family):
    """Upper triangular Toeplitz matrix with few diagonals, `M[i, j] = d[j - i]` if 0 <= j - i < bands, otherwise 0.

    Attributes:
        d: (bands,), where `d[k]` is the value on diagonal k, counted upwards from the main diagonal.
        shape: `(in_features, out_features)`.
        bands: The number of diagonals that are not zero.
        lower: Whether this is the transpose of such a matrix, with the diagonals below the main diagonal.
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
        """Return the zero matrix. As `M` is linear in `d`, the gradient of `d` is not zero, and nothing is random."""
        return cls(jnp.zeros(bands, dtype), checked_shape(cls.__name__, shape), bands)

    @classmethod
    def nearest(cls, dense: Any, *, bands: int = 2) -> Self:
        """Return the matrix whose diagonals hold the means of the diagonals of `dense`."""
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        means = [jnp.mean(jnp.diagonal(dense, k)) if k < n else jnp.zeros((), dense.dtype) for k in range(bands)]
        return cls(jnp.stack(means), (m, n), bands)

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest number of diagonals that the budget of parameters and the shape allow."""
        return {"bands": min(budget, shape[1])} if budget >= 1 else None

    @property
    def T(self) -> "Banded":
        """The transpose: the same `d`, with the diagonals on the other side of the main diagonal."""
        return Banded(self.d, self.shape[::-1], self.bands, not self.lower)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return jnp.matmul(x, self._dense(), precision="highest")

    def _dense(self) -> Float[Array, "in out"]:
        m, n = self.shape[::-1] if self.lower else self.shape
        M = sum(self.d[k] * jnp.eye(m, n, k, dtype=self.d.dtype) for k in range(self.bands))
        return M.T if self.lower else M
