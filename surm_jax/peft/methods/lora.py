"""LoRA, the low-rank baseline, and its variants with another factor or other trained parameters."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.update import NormalizedPart, UpdatePart
from surm_jax.structured import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LowRankUpdate(Update):
    """The settings that LoRA and its variants share.

    Attributes:
        rank: The rank of the update. It also determines the factor of alpha.
    """

    rank: int = 1

    def unit(self, shape: tuple[int, int]) -> float:
        """Return LoRA's factor `1 / rank`, which keeps the size of the update similar for all ranks."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Return a zero matrix of the given shape whose factors can be trained."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(_LowRankUpdate):
    """LoRA (arXiv 2106.09685): `alpha / rank * down @ up`; up starts at 0, down at `N(0, 1 / in_features)`.

    >>> LoRA(rank=4).init(jax.random.key(0), (768, 768)).num_params
    6144
    """

    name: ClassVar[str] = "lora"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStabilizedLoRA(_LowRankUpdate):
    """LoRA with `alpha / sqrt(rank)`, so that large ranks learn as fast as small ones (rsLoRA, arXiv 2312.03732)."""

    name: ClassVar[str] = "rslora"
    rank: int = 8

    def unit(self, shape: tuple[int, int]) -> float:
        """Return `1 / sqrt(rank)`."""
        del shape
        return self.rank**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFix(_LowRankUpdate):
    """LoRA with the random factor `down` frozen: only `up` is trained, out * rank numbers.

    LoRA-FIX in SURM's tables, and LoRA-FA in arXiv 2308.03303. The frozen factor is saved with the adapter.
    """

    name: ClassVar[str] = "lora_fix"
    frozen: ClassVar[tuple[str, ...]] = ("down",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(_LowRankUpdate):
    """LoRA for the direction of each column of the kernel, and a trained length m for each (arXiv 2402.09353).

    `W' = m (W + s down @ up) / || W + s down @ up ||` with `s = alpha / rank`. The norms are those of columns, one for
    each output feature, and m starts at the norms of W. There are in * rank + out * rank + out trained numbers.
    """

    name: ClassVar[str] = "dora"
    part: ClassVar[type[UpdatePart]] = NormalizedPart
