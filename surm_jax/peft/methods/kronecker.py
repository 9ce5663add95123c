"""Methods with Kronecker products: the update and the branch of SURM."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import Kronecker


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Return uniform numbers of variance `1 / (3 fan_in)`, as PyTorch's linear layers and the paper's code do."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zero_kronecker(key: jax.Array, shape: tuple[int, int], scale: float) -> Kronecker:
    """Return `A (x) B` of near-square factors with A = 0 and B = `scale` times Kaiming-uniform numbers."""
    matrix = Kronecker.init(key, shape, scale=1.0)
    return matrix.with_arrays(B=scale * kaiming_uniform(key, matrix.B.shape, matrix.B.shape[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerUpdate(Update):
    """`A (x) B` with near-square factors: 2n numbers at 768 = 32 * 24; A starts at 0, B Kaiming-uniform.

    SURM, arXiv 2406.17740, section 4.1. `scale` multiplies B's first values, which lie within `1 / sqrt(rows of B)`.

    >>> KroneckerUpdate().init(jax.random.key(0), (768, 768)).num_params
    1536
    """

    name: ClassVar[str] = "kronecker"
    scale: float = 1.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Kronecker:
        """Return a zero matrix of the given shape whose factors can learn."""
        return zero_kronecker(key, shape, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerBranch(Branch):
    """`X + gelu(X (A (x) B)) + b`: 3n numbers at 768 (arXiv 2406.17740, section 4.2)."""

    name: ClassVar[str] = "kronecker_adapter"
    scale: float = 1.0

    def init_branch(self, key: jax.Array, width: int) -> tuple[Kronecker]:
        """Return a zero matrix whose factors can learn."""
        return (zero_kronecker(key, (width, width), self.scale),)
