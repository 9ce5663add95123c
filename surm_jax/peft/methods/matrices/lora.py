"""LoRA, the low-rank baseline, and three variants of it.

rsLoRA divides alpha by the square root of the rank, LoRA-FIX freezes one of the two low-rank matrices, and DoRA also
trains the lengths of the kernel's columns.
"""

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
        rank: The rank of the update. alpha is divided by it, or by its square root in `RankStabilizedLoRA`.
    """

    rank: int = 1

    def unit(self, shape: tuple[int, int]) -> float:
        """Return LoRA's factor `1 / rank`, with which updates of different ranks have a similar size."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(_LowRankUpdate):
    """A low-rank matrix, `alpha / rank * down @ up` (LoRA, arXiv 2106.09685).

    `up` starts at 0, and `down` at `N(0, 1 / in_features)`. In this example, both have 768 * 4 parameters:

    >>> LoRA(rank=4).init(jax.random.key(0), (768, 768)).num_params
    6144
    """

    name: ClassVar[str] = "lora"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStabilizedLoRA(_LowRankUpdate):
    """LoRA with the factor `alpha / sqrt(rank)`: large ranks learn as fast as small ones (rsLoRA, arXiv 2312.03732)."""

    name: ClassVar[str] = "rslora"
    rank: int = 8

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor of rsLoRA, `1 / sqrt(rank)`."""
        del shape
        return self.rank**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFix(_LowRankUpdate):
    """LoRA whose random matrix `down` stays frozen. Only `up` is trained, which has out_features * rank parameters.

    The method is called LoRA-FIX in SURM's tables, and LoRA-FA in arXiv 2308.03303. The frozen matrix is saved with the
    adapter.
    """

    name: ClassVar[str] = "lora_fix"
    frozen: ClassVar[tuple[str, ...]] = ("down",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(_LowRankUpdate):
    """LoRA that trains the directions of the kernel's columns, together with their lengths m (arXiv 2402.09353).

    The new kernel is `W' = m (W + s down @ up) / || W + s down @ up ||` with `s = alpha / rank`. There is one norm and
    one length for each column, which is one output feature. m starts at the norms of the columns of W. There are
    in * rank + out * rank + out trained parameters.
    """

    name: ClassVar[str] = "dora"
    part: ClassVar[type[UpdatePart]] = NormalizedPart
