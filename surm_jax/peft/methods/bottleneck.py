"""Bottleneck adapters: branches of two dense matrices with a small hidden layer between them."""

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
    """The settings of branches with a small hidden layer, the waist.

    Attributes:
        waist: The number of features of the hidden layer between the two matrices.
        scale: The standard deviation of the initial entries of the first matrix. The second matrix starts at zero.
    """

    waisted: ClassVar[bool] = True
    waist: int = 64
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[Dense, Dense]:
        """Return the two initial matrices: a random one, (width, waist), and one of zeros, (waist, width)."""
        down = self.scale * jax.random.normal(key, (width, self.waist))
        return Dense(down), Dense.init(key, (self.waist, width), scale=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckBranch(_Waisted):
    """Bottleneck adapters `X + gelu(X D + d) U + b` after attention and MLP (Houlsby et al., arXiv 1902.00751).

    With `--config.peft.target=pfeiffer` they are added only after the MLP (arXiv 2005.00247).
    """

    name: ClassVar[str] = "bottleneck"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterDrop(_Waisted):
    """Bottleneck adapters in all blocks except the first ones (the specialised AdapterDrop of arXiv 2010.11918).

    Attributes:
        skip: The number of blocks at the start of the model that get no adapter. The index of a module's block is the
            first number in the module's path.
    """

    name: ClassVar[str] = "adapter_drop"
    skip: int = at_least(5, 0)

    def choose(self, paths: list[str]) -> list[str]:
        """Return the paths of the modules in a block whose index is at least `skip`, or outside of all blocks.

        Raises:
            UserError: If all of the modules are in blocks with smaller indices.
        """
        blocks = {path: _block(path) for path in paths}
        chosen = [path for path, block in blocks.items() if block is None or block >= self.skip]
        if not chosen:
            last = max(block for block in blocks.values() if block is not None)
            raise UserError(
                f"{self.name}.skip={self.skip} leaves no block with an adapter: the last block is {last}, so skip must"
                f" be at most {last}"
            )
        return chosen


def _block(path: str) -> int | None:
    number = re.search(r"(?:^|/)(\d+)(?=/|$)", path)
    return number and int(number[1])
