"""Methods with Kronecker products: SURM's update and branch."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import Kronecker


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Return uniform random numbers of variance `1 / (3 fan_in)`, as in PyTorch's linear layers and in SURM's code."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zero_kronecker(key: jax.Array, shape: tuple[int, int], scale: float) -> Kronecker:
    """Return a Kronecker product `A (x) B` of near-square factors, where A is 0 and B is `scale` * Kaiming-uniform."""
    matrix = Kronecker.init(key, shape, scale=1.0)
    return matrix.with_arrays(B=scale * kaiming_uniform(key, matrix.B.shape, matrix.B.shape[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerUpdate(Update):
    """A Kronecker product `A (x) B` of near-square factors, which has 2n parameters for n = 768 = 32 * 24.

    The method is SURM's (arXiv 2406.17740, section 4.1). A starts at 0. B starts Kaiming-uniform: at `scale` times
    uniform random numbers between `-1 / sqrt(rows of B)` and `1 / sqrt(rows of B)`. In this example, A has the shape
    (32, 24), and B has the shape (24, 32):

    >>> KroneckerUpdate().init(jax.random.key(0), (768, 768)).num_params
    1536
    """

    name: ClassVar[str] = "kronecker"
    scale: float = 1.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Kronecker:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return zero_kronecker(key, shape, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerBranch(Branch):
    """`X + gelu(X (A (x) B)) + b` with near-square factors A and B, which trains 3n parameters for n = 768.

    The method is SURM's (arXiv 2406.17740, section 4.2).
    """

    name: ClassVar[str] = "kronecker_adapter"
    scale: float = 1.0

    def init_branch(self, key: jax.Array, width: int) -> tuple[Kronecker]:
        """Return an initial matrix. It is zero, but the gradient of its arrays is not."""
        return (zero_kronecker(key, (width, width), self.scale),)
