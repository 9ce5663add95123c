"""LoRA, the low-rank baseline, and its variants that differ in a factor or in what is trained."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.base import Update
from surm_jax.structured import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Update):
    """LoRA (arXiv 2106.09685): `alpha / rank * A B^T`; A starts at 0, B at `N(0, 1 / in_features)`.

    >>> LoRA(rank=4).init(jax.random.key(0), (768, 768)).num_params
    6144
    """

    name: ClassVar[str] = "lora"
    rank: int = 1

    def factor(self, shape: tuple[int, int]) -> float:
        """Returns the paper's `alpha / rank`, which keeps the size of the update as the rank grows."""
        del shape
        return self.alpha / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Returns the zero matrix of the given shape as a product."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)
