"""Sums of Kronecker products with low-rank factors: LoKr, KAdaptation and Compacter."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from surm_jax.errors import UserError
from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.matrices.kronecker import kaiming_uniform
from surm_jax.peft.methods.settings import at_least
from surm_jax.peft.methods.update import Update
from surm_jax.structured import Kronecker, LowRankKronecker


def balanced_factors(size: int, divisor: int = 0) -> tuple[int, int]:
    """Return the two factors into which the LoKr of Hugging Face's peft splits a size.

    A `divisor` that divides the size is the first factor. Otherwise, the first factor is the largest one up to
    `divisor` and up to the square root of the size. `divisor=0` leaves only the limit of the square root. It
    corresponds to `decompose_factor=-1` in peft.

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
    """A Kronecker product `A (x) B` with the factor `alpha / rank`, as in peft's LoKr (arXiv 2309.14859).

    A starts at 0, and B is Kaiming-uniform. `balanced_factors` splits each size of the kernel into two factors.
    The first factors give the shape of A, and the second ones the shape of B. If the rank is less than half of the
    larger size of B, and at most the smaller one, B is a product `down @ up` of that rank. In this example, A is a
    24 x 24 matrix, and B is the product of a 32 x 8 and an 8 x 32 matrix:

    >>> LoKr(rank=8).init(jax.random.key(0), (768, 768)).num_params
    1088

    Attributes:
        rank: The rank of B, if B is a product. alpha is always divided by it.
        divisor: The first factor of each size (see `balanced_factors`). 0 means the largest factor up to the square
            root of the size.
    """

    name: ClassVar[str] = "lokr"
    rank: int = 8
    divisor: int = at_least(0, 0)

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor of LoKr, `1 / rank`."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Kronecker | LowRankKronecker:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        (m1, m2), (n1, n2) = (balanced_factors(size, self.divisor) for size in shape)
        A = jnp.zeros((1, m1, n1), jnp.float32)
        if self.rank >= max(m2, n2) / 2 or self.rank > min(m2, n2):
            return Kronecker(A, kaiming_uniform(key, (1, m2, n2), m2))
        key_down, key_up = jax.random.split(key)
        down = kaiming_uniform(key_down, (1, m2, self.rank), m2)
        return LowRankKronecker(A, down, kaiming_uniform(key_up, (1, self.rank, n2), self.rank))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KAdaptation(Update):
    """A sum of Kronecker products, `sum_k A_k (x) (down_k up_k)`, with small square A_k (arXiv 2203.16329).

    A and down start at random values, up at 0. The code released with the paper starts both down and up at 0, so that
    the gradients of all arrays stay zero. In the paper all layers share the A_k. Here each layer has its own.
    In this example, A has 4 * 4 * 4 parameters, and down and up have 4 * 192 each:

    >>> KAdaptation().init(jax.random.key(0), (768, 768)).num_params
    1600

    Attributes:
        terms: The number of Kronecker products, and also of the rows and columns of each A_k. It must divide
            in_features and out_features.
        rank: The rank of each product `down_k up_k`.
        scale: The standard deviation of the initial entries of A and of down.
    """

    name: ClassVar[str] = "kadaptation"
    zero: ClassVar[str] = "up"
    terms: int = 4
    rank: int = 1
    scale: float = 0.1

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRankKronecker:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        matrix = _hypercomplex(key, shape, self.terms, self.rank, self.scale, self.scale)
        return matrix.with_arrays(up=jnp.zeros_like(matrix.up))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(Branch):
    """A bottleneck adapter whose two matrices have the form `sum_k A_k (x) (down_k up_k)` (arXiv 2106.04647).

    In the paper all adapters share the A_k. Here each of the two matrices has its own A_k, with terms^3 parameters.

    Attributes:
        terms: The number of Kronecker products, and also of the rows and columns of each A_k. It must divide the width
            of the module's output and the waist, which is the number of features between the two matrices.
        reduction: The ratio of the width to the waist.
        rank: The rank of each product `down_k up_k`.
        scale: The standard deviation of the initial entries of the first matrix.
    """

    name: ClassVar[str] = "compacter"
    waisted: ClassVar[bool] = True
    terms: int = 4
    reduction: int = 16
    rank: int = 1
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[LowRankKronecker, LowRankKronecker]:
        """Return the two initial matrices: a random one, (width, waist), and one that equals zero, (waist, width)."""
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
    """Return a random sum of `terms` Kronecker products whose first factors have the shape (terms, terms).

    `scale_A` is the standard deviation of the first factors, and `scale_low` that of the arrays `down` and `up`.
    """
    m, n = shape
    if m % terms or n % terms:
        raise UserError(f"terms={terms} must divide both sizes of {m} x {n}")
    factors = ((terms, terms), (m // terms, n // terms))
    key_A, key_B = jax.random.split(key)
    matrix = LowRankKronecker.init(key_B, shape, scale=scale_low, rank=rank, terms=terms, factor_shapes=factors)
    return matrix.with_arrays(A=scale_A * jax.random.normal(key_A, matrix.A.shape))
