"""GraLoRA: updates by a grid of blocks of low rank."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.update import Update
from surm_jax.structured import BlockLowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraLoRA(Update):
    """A grid of blocks of low rank with the factor `alpha / rank`, as in peft's GraLoRA (arXiv 2505.20355).

    There are `blocks * blocks` blocks of rank `rank / blocks`, which have as many parameters as LoRA at the same rank.
    In each block, `up` starts at 0, and `down` at `N(0, blocks / in_features)`. peft draws `down` uniformly, with a
    third of this variance.

    >>> GraLoRA(rank=8).init(jax.random.key(0), (768, 768)).num_params
    12288

    Attributes:
        rank: The sum of the ranks of the blocks in one row of the grid. alpha is divided by it.
        blocks: The number of blocks in each row and column of the grid. It must divide the rank, in_features and
            out_features.
    """

    name: ClassVar[str] = "gralora"
    rank: int = 8
    blocks: int = 2

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor of GraLoRA, `1 / rank`."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> BlockLowRank:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        scale = (self.blocks / shape[0]) ** 0.5
        return BlockLowRank.init(key, shape, scale=scale, rank=self.rank, blocks=self.blocks)
