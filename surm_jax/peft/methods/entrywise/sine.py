"""Sine-LoRA: the sine of a low-rank matrix, entry by entry."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.entrywise import EntrywisePart
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import LowRank, StructuredMatrix


class SinePart(EntrywisePart):
    """An update by the sine of the entries of M, `sin(omega * M)`.

    Args:
        matrix: The matrix M.
        kernel: The layer's kernel, which is not used.
        omega: The frequency.
        **settings: The other settings of `UpdatePart`.
    """

    formula = "sin({})"

    def __init__(
        self, matrix: StructuredMatrix, kernel: Float[Array, "in out"], *, omega: float, **settings: Any
    ) -> None:
        super().__init__(matrix, kernel, **settings)
        self.omega = omega

    def entries(self, matrix: Float[Array, "in out"], kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return the sine of all entries of M."""
        return jnp.sin(self.omega * matrix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SineLoRA(Update):
    """The sine of a low-rank matrix, `alpha / rank * sin(omega * down @ up) / sqrt(in)` (arXiv 2403.19243).

    The sine is taken of each entry, so that the rank of the update can be full. `up` starts at 0, and `down` at
    `N(0, 1 / in_features)`. The released code (samy-ji/Sine-Low-Rank) draws `down` uniformly, with a third of this
    variance, and has no default of omega.

    Attributes:
        rank: The rank of the matrix in the sine. alpha is divided by it.
        omega: The frequency. A larger one gives a higher rank and larger steps.
    """

    name: ClassVar[str] = "sine_lora"
    part: ClassVar[type[UpdatePart]] = SinePart
    rank: int = 8
    omega: float = 200.0

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor, `1 / (rank * sqrt(in_features))`."""
        return 1 / (self.rank * shape[0] ** 0.5)

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)

    def part_settings(self) -> dict[str, Any]:
        """Return the frequency of the sine, which `part` takes as an argument."""
        return {"omega": self.omega}
