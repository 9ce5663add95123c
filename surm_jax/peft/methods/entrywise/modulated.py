"""Methods that multiply the entries of a kernel: HiRA, and modulation by a matrix of any family."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.matrices.structured import StructuredUpdate
from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.entrywise import ModulatedPart
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import LowRank


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(Update):
    """The entrywise product of the kernel W and a low-rank matrix, `alpha * W * (down @ up)`, as in peft's HiRA.

    The rank of the change can be up to the rank of W times `rank`. `up` starts at 0, and `down` at
    `N(0, 1 / in_features)`; peft draws `down` uniformly, with a third of this variance. peft has no alpha.

    Attributes:
        rank: The rank of the matrix by which W is multiplied. alpha is not divided by it.
    """

    name: ClassVar[str] = "hira"
    part: ClassVar[type[UpdatePart]] = ModulatedPart
    rank: int = 8

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModulatedUpdate(StructuredUpdate):
    """The entrywise product of the kernel W and a matrix M of any family, `alpha * W * M`.

    The settings choose the family and the start of M, as in the method `structured`. With the family `LowRank` this is
    HiRA with another start. With other families it is our own method.
    """

    name: ClassVar[str] = "modulated"
    part: ClassVar[type[UpdatePart]] = ModulatedPart
