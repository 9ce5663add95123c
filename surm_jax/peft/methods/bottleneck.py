"""The bottleneck adapters of the literature: two dense matrices through a narrow waist, and variants of them."""

import dataclasses
import re
from typing import ClassVar

import jax

from surm_jax.errors import UserError
from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.settings import at_least
from surm_jax.structured import Dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Waisted(Branch):
    """Settings of branches with a waist.

    Attributes:
        waist: Features between the two matrices.
        scale: Standard deviation of the first matrix at the start; the second starts at zero.
    """

    waisted: ClassVar[bool] = True
    waist: int = 64
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[Dense, Dense]:
        """Return the random matrix into the waist and the zero one out of it."""
        down = self.scale * jax.random.normal(key, (width, self.waist))
        return Dense(down), Dense.init(key, (self.waist, width), scale=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckBranch(_Waisted):
    """`X + gelu(X D + d) U + b` after attention and MLP (Houlsby, arXiv 1902.00751).

    With `--config.peft.target=pfeiffer`, only after the MLP (arXiv 2005.00247).
    """

    name: ClassVar[str] = "bottleneck"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterDrop(_Waisted):
    """Bottleneck branches in all blocks but the first ones (AdapterDrop, arXiv 2010.11918, "specialised").

    Attributes:
        skip: How many of the first blocks have no adapter. The block of a module is the first number in its path.
    """

    name: ClassVar[str] = "adapter_drop"
    skip: int = at_least(5, 0)

    def choose(self, paths: list[str]) -> list[str]:
        """Return the modules in blocks from `skip` on, and those in no block.

        Raises:
            UserError: If there is none.
        """
        blocks = {path: _block(path) for path in paths}
        chosen = [path for path, block in blocks.items() if block is None or block >= self.skip]
        if not chosen:
            last = max(block for block in blocks.values() if block is not None)
            raise UserError(
                f"{self.name}.skip={self.skip} leaves no block an adapter: the last one is {last}, so skip must be at"
                f" most {last}"
            )
        return chosen


def _block(path: str) -> int | None:
    number = re.search(r"(?:^|/)(\d+)(?=/|$)", path)
    return number and int(number[1])
