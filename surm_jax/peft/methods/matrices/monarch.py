"""MoRe: updates by Monarch matrices."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.update import Update
from surm_jax.structured import Monarch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRe(Update):
    """A Monarch matrix: two block-diagonal matrices, with a permutation after each (MoRe, arXiv 2408.17383).

    It has as many parameters as LoRA at the same rank, `rank * (in + out)`. The second matrix L starts at 0. The first
    matrix R starts at `N(0, blocks / in_features)`, which is our choice: each of its blocks is like LoRA's `down`.

    >>> MoRe().init(jax.random.key(0), (768, 768)).num_params
    6144

    Attributes:
        rank: The inner width of each block.
        blocks: The number of blocks of each matrix. It must divide in_features and out_features.
    """

    name: ClassVar[str] = "more"
    rank: int = 4
    blocks: int = 4

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Monarch:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return Monarch.init(key, shape, scale=(self.blocks / shape[0]) ** 0.5, rank=self.rank, blocks=self.blocks)
