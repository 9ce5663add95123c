"""MoRA: updates of high rank with one small square matrix."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.update import Update
from surm_jax.structured import Tiled, tiled_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRA(Update):
    """A square matrix with the size of LoRA at `rank`, between fixed compression and decompression; starts at 0.

    MoRA (arXiv 2405.12130). Without `rotate`, groups of features share a row, which the paper chooses for large ranks.
    With `rotate`, groups of features are rotated as in rotary position embeddings, which the paper chooses for small
    ranks.

    >>> MoRA(rank=1).init(jax.random.key(0), (768, 768)).num_params
    1521
    """

    name: ClassVar[str] = "mora"
    rank: int = 8
    rotate: bool = False

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Tiled:
        """Return a zero matrix of the given shape that can be trained."""
        side = tiled_side(shape, self.rank, rotate=self.rotate)
        return Tiled.init(key, shape, scale=1.0, side=side, rotate=self.rotate)
