"""Methods with products of two Toeplitz matrices: SURM's symmetric update and branch, and a general update."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import SymmetricToeplitzPair, ToeplitzPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToeplitzUpdate(Update):
    """The product `T2 T1` of symmetric Toeplitz matrices: 2n numbers; T1 starts at 0, T2 at `scale * N(0, 1)`.

    SURM, arXiv 2406.17740, section 4.1. The default scale is that of the released code.

    >>> ToeplitzUpdate().init(jax.random.key(0), (768, 768)).num_params
    1536
    """

    name: ClassVar[str] = "toeplitz"
    scale: float = 0.02

    def init(self, key: jax.Array, shape: tuple[int, int]) -> SymmetricToeplitzPair:
        """Return a zero matrix of the given shape whose factors can be trained."""
        return SymmetricToeplitzPair.init(key, shape, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsymmetricToeplitzUpdate(Update):
    """The product `T2 T1` of general Toeplitz matrices: 4n - 2 numbers for a square kernel.

    >>> AsymmetricToeplitzUpdate().init(jax.random.key(0), (768, 768)).num_params
    3070
    """

    name: ClassVar[str] = "toeplitz_asymmetric"
    scale: float = 0.02

    def init(self, key: jax.Array, shape: tuple[int, int]) -> ToeplitzPair:
        """Return a zero matrix of the given shape whose factors can be trained."""
        return ToeplitzPair.init(key, shape, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToeplitzBranch(Branch):
    """`X + gelu(X T1 T2) + b` with symmetric Toeplitz matrices: 3n numbers (arXiv 2406.17740, section 4.2)."""

    name: ClassVar[str] = "toeplitz_adapter"
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[SymmetricToeplitzPair]:
        """Return a zero matrix whose factors can be trained."""
        return (SymmetricToeplitzPair.init(key, (width, width), scale=self.scale),)
