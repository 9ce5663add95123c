"""Sums of Kronecker products with low-rank factors: LoKr, KAdaptation and Compacter."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from surm_jax.errors import UserError
from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.kronecker import kaiming_uniform
from surm_jax.peft.methods.settings import at_least
from surm_jax.peft.methods.update import Update
from surm_jax.structured import Kronecker, LowRankKronecker


def balanced_factors(size: int, divisor: int = 0) -> tuple[int, int]:
    """Return two factors of a size as peft chooses them for LoKr; its `decompose_factor=-1` is our 0.

    >>> balanced_factors(768), balanced_factors(768, 8), balanced_factors(768, 10)
    ((24, 32), (8, 96), (8, 96))
    """
    if divisor and size % divisor == 0:
        return divisor, size // divisor
    largest = min(divisor or size, math.isqrt(size))
    first = next(number for number in range(largest, 0, -1) if size % number == 0)
    return first, size // first


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Update):
    """`alpha / rank * A (x) B`, as peft's LoKr (arXiv 2309.14859): A starts at 0, B Kaiming-uniform.

    Both sizes are factored by `balanced_factors`; A has the first factors of both, B the second. If the rank is less
    than half of B's longer side, B is a product `down up` of that rank.

    >>> LoKr(rank=8).init(jax.random.key(0), (768, 768)).num_params
    1088

    Attributes:
        rank: Rank of B; it also divides alpha.
        divisor: First factor of both sizes; 0 means the one nearest to their square roots.
    """

    name: ClassVar[str] = "lokr"
    rank: int = 8
    divisor: int = at_least(0, 0)

    def unit(self, shape: tuple[int, int]) -> float:
        """Return `1 / rank`."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Kronecker | LowRankKronecker:
        """Return a zero matrix of the given shape whose factors can learn."""
        (m1, m2), (n1, n2) = (balanced_factors(size, self.divisor) for size in shape)
        A = jnp.zeros((1, m1, n1), jnp.float32)
        if self.rank >= max(m2, n2) / 2 or self.rank > min(m2, n2):
            return Kronecker(A, kaiming_uniform(key, (1, m2, n2), m2))
        key_down, key_up = jax.random.split(key)
        down = kaiming_uniform(key_down, (1, m2, self.rank), m2)
        return LowRankKronecker(A, down, kaiming_uniform(key_up, (1, self.rank, n2), self.rank))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KAdaptation(Update):
    """`sum_k A_k (x) (down_k up_k)` with small square A_k (arXiv 2203.16329).

    A and down start at random, up at 0. The code that was released with the paper starts both down and up at 0, where
    neither ever gets a gradient. In the paper the A_k are shared by all layers; here each layer has its own.

    >>> KAdaptation().init(jax.random.key(0), (768, 768)).num_params
    1600

    Attributes:
        terms: Number of products, and side of the A_k; must divide both sizes.
        rank: Rank of the second factors.
        scale: Standard deviation of A and down.
    """

    name: ClassVar[str] = "kadaptation"
    zero: ClassVar[str] = "up"
    terms: int = 4
    rank: int = 1
    scale: float = 0.1

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRankKronecker:
        """Return a zero matrix of the given shape whose factors can learn."""
        matrix = _hypercomplex(key, shape, self.terms, self.rank, self.scale, self.scale)
        return matrix.with_arrays(up=jnp.zeros_like(matrix.up))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(Branch):
    """A bottleneck branch whose two matrices are `sum_k A_k (x) (down_k up_k)` (arXiv 2106.04647).

    In the paper the A_k are shared by all adapters; here each adapter has its own, terms^3 numbers.

    Attributes:
        terms: Number of products, and side of the A_k; must divide the width and the waist.
        reduction: Width over waist.
        rank: Rank of the second factors.
        scale: Standard deviation of the entries of the first matrix at the start.
    """

    name: ClassVar[str] = "compacter"
    waisted: ClassVar[bool] = True
    terms: int = 4
    reduction: int = 16
    rank: int = 1
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[LowRankKronecker, LowRankKronecker]:
        """Return the random matrix into the waist and the zero one out of it."""
        if width % self.reduction:
            raise UserError(f"compacter.reduction={self.reduction} does not divide the width {width}")
        waist, (key_down, key_up) = width // self.reduction, jax.random.split(key)
        low = (self.scale / self.rank**0.5) ** 0.5
        down = _hypercomplex(key_down, (width, waist), self.terms, self.rank, self.terms**-0.5, low)
        up = _hypercomplex(key_up, (waist, width), self.terms, self.rank, 1.0, low)
        return down, up.with_arrays(A=jnp.zeros_like(up.A))


def _hypercomplex(
    key: jax.Array, shape: tuple[int, int], terms: int, rank: int, scale_A: float, scale_low: float
) -> LowRankKronecker:
    """Return the sum of `terms` products whose first factors are square of that side, all numbers random."""
    m, n = shape
    if m % terms or n % terms:
        raise UserError(f"terms={terms} must divide both sizes of {m} x {n}")
    factors = ((terms, terms), (m // terms, n // terms))
    key_A, key_B = jax.random.split(key)
    matrix = LowRankKronecker.init(key_B, shape, scale=scale_low, rank=rank, terms=terms, factor_shapes=factors)
    return matrix.with_arrays(A=scale_A * jax.random.normal(key_A, matrix.A.shape))
