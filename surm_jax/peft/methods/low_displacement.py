"""Matrices of low displacement rank, W(G, H)."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import LowDisplacementRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowDisplacementUpdate(Update):
    """`W(G, H)`: r products of a circulant and a skew-circulant, 2nr numbers (SURM, arXiv 2406.17740, section 3).

    The circulant factors G start at 0, the skew ones H at `scale * N(0, 1)`; the scale is the released code's.

    >>> LowDisplacementUpdate(rank=4).init(jax.random.key(0), (768, 768)).num_params
    6144
    """

    name: ClassVar[str] = "low_displacement"
    rank: int = 1
    scale: float = 0.02

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowDisplacementRank:
        """Return a zero matrix of the given shape whose factors can learn."""
        return LowDisplacementRank.init(key, shape, rank=self.rank, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowDisplacementBranch(Branch):
    """`X + gelu(X W(G, H)) + b`: 2nr + n numbers."""

    name: ClassVar[str] = "low_displacement_adapter"
    rank: int = 1
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[LowDisplacementRank]:
        """Return a zero matrix whose factors can learn."""
        return (LowDisplacementRank.init(key, (width, width), rank=self.rank, scale=self.scale),)
