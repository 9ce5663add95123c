"""MoRA: updates of high rank with one small square matrix."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.update import Update
from surm_jax.structured import Tiled, tiled_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRA(Update):
    """A trained square matrix between a fixed compression and a fixed decompression (MoRA, arXiv 2405.12130).

    The square matrix starts at 0, and has about as many parameters as LoRA at `rank`. Without `rotate`, groups of
    features share a row of this matrix, which the paper chooses for large ranks. With `rotate`, groups of features are
    rotated as in rotary position embeddings, which the paper chooses for small ranks. In this example, the square
    matrix has the shape (39, 39):

    >>> MoRA(rank=1).init(jax.random.key(0), (768, 768)).num_params
    1521
    """

    name: ClassVar[str] = "mora"
    rank: int = 8
    rotate: bool = False

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Tiled:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        side = tiled_side(shape, self.rank, rotate=self.rotate)
        return Tiled.init(key, shape, scale=1.0, side=side, rotate=self.rotate)
