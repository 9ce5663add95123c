"""Methods with products of two Toeplitz matrices: SURM's symmetric update and branch, and a general update."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import SymmetricToeplitzPair, ToeplitzPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToeplitzUpdate(Update):
    """The product `T2 T1` of two symmetric Toeplitz matrices, which has 2n parameters for an n x n kernel.

    The method is SURM's (arXiv 2406.17740, section 4.1), and is written as in the paper: T1 is applied to the input,
    and T2 to the result. T1 starts at 0, and T2 at `scale * N(0, 1)`. The default scale is that of the code released
    with the paper.

    >>> ToeplitzUpdate().init(jax.random.key(0), (768, 768)).num_params
    1536
    """

    name: ClassVar[str] = "toeplitz"
    scale: float = 0.02

    def init(self, key: jax.Array, shape: tuple[int, int]) -> SymmetricToeplitzPair:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return SymmetricToeplitzPair.init(key, shape, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsymmetricToeplitzUpdate(Update):
    """The product `T2 T1` of two general Toeplitz matrices, which has 4n - 2 parameters for an n x n kernel.

    >>> AsymmetricToeplitzUpdate().init(jax.random.key(0), (768, 768)).num_params
    3070
    """

    name: ClassVar[str] = "toeplitz_asymmetric"
    scale: float = 0.02

    def init(self, key: jax.Array, shape: tuple[int, int]) -> ToeplitzPair:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return ToeplitzPair.init(key, shape, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToeplitzBranch(Branch):
    """`X + gelu(X T1 T2) + b` with symmetric Toeplitz matrices and 3n parameters (arXiv 2406.17740, section 4.2)."""

    name: ClassVar[str] = "toeplitz_adapter"
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[SymmetricToeplitzPair]:
        """Return an initial matrix. It is zero, but the gradient of its arrays is not."""
        return (SymmetricToeplitzPair.init(key, (width, width), scale=self.scale),)
