"""Methods with matrices of low displacement rank: SURM's update and branch."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import LowDisplacementRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowDisplacementUpdate(Update):
    """A sum `W(G, H)` of r products of a circulant and a skew-circulant, with 2nr parameters (arXiv 2406.17740).

    Section 3 of the paper defines the family. The setting `rank` is r. G contains the vectors of the r circulants,
    which start at 0. H contains the vectors of the r skew-circulants, which start at `scale * N(0, 1)`. The default
    scale is that of the code released with the paper.

    >>> LowDisplacementUpdate(rank=4).init(jax.random.key(0), (768, 768)).num_params
    6144
    """

    name: ClassVar[str] = "low_displacement"
    rank: int = 1
    scale: float = 0.02

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowDisplacementRank:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return LowDisplacementRank.init(key, shape, rank=self.rank, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowDisplacementBranch(Branch):
    """`X + gelu(X W) + b` with a matrix W of low displacement rank r, which trains 2nr + n parameters."""

    name: ClassVar[str] = "low_displacement_adapter"
    rank: int = 1
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[LowDisplacementRank]:
        """Return an initial matrix. It is zero, but the gradient of its arrays is not."""
        return (LowDisplacementRank.init(key, (width, width), rank=self.rank, scale=self.scale),)
