"""Any family of `surm_jax.structured` by its name, and sums and products of families."""

import dataclasses
import itertools
from typing import Any, ClassVar

import jax

from surm_jax.errors import UserError, did_you_mean
from surm_jax.peft.methods.base import Method
from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.update import Update
from surm_jax.structured import FAMILIES, Product, StructuredMatrix, Sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AnyFamily(Method):
    """The settings that choose a matrix.

    Attributes:
        family: One of `surm_jax.structured.FAMILIES`, or an expression of them.
        rank: Rank, for the families that have one. Tiles get as many numbers as LoRA of this rank.
        f: The factor f of f-circulants.
        scale: Standard deviation of random factors.
    """

    family: str = "CirculantPair"
    rank: int = 1
    f: float = 0.5
    scale: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name.strip() for term in self.family.split("+") for name in term.split("@")]
        for name in names:
            if name not in FAMILIES:
                raise UserError(
                    f"{self.name}.family: no family is called {name!r}{did_you_mean(name, FAMILIES)}"
                    f" (known: {', '.join(FAMILIES)}; + and @ join them)"
                )

    def zero_matrix(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return a zero matrix of the given shape that can learn."""
        return _zero(self.family, key, shape, {"rank": self.rank, "f": self.f, "scale": self.scale})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredUpdate(_AnyFamily, Update):
    """A family, such as `SkewCirculant`; a sum, such as `CirculantPair + LowRank`; or a product, with `@`.

    A product binds tighter than a sum, and its first factor, which meets the input, starts at zero.

    >>> update = StructuredUpdate(family="Toeplitz @ Circulant + LowRank", rank=2)
    >>> update.init(jax.random.key(0), (8, 8)).num_params
    55
    """

    name: ClassVar[str] = "structured"

    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return a zero matrix of the given shape that can learn."""
        return self.zero_matrix(key, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredBranch(_AnyFamily, Branch):
    """`X + gelu(X M) + b` with M of any family, sum or product, named as in `structured`."""

    name: ClassVar[str] = "structured_adapter"

    def init_branch(self, key: jax.Array, width: int) -> tuple[StructuredMatrix]:
        """Return a zero matrix that can learn."""
        return (self.zero_matrix(key, (width, width)),)


def _zero(expression: str, key: jax.Array, shape: tuple[int, int], options: dict[str, Any]) -> StructuredMatrix:
    """Return the zero matrix that an expression stands for, which can learn."""
    terms = []
    for number, term in enumerate(expression.split("+")):
        between = min(shape)
        names = [name.strip() for name in term.split("@")]
        sizes = [shape[0], *[between] * (len(names) - 1), shape[1]]
        keys = jax.random.split(jax.random.fold_in(key, number), len(names))
        factors = [
            _family(name, factor_key, size, options)
            for name, factor_key, size in zip(names, keys, itertools.pairwise(sizes), strict=True)
        ]
        # If all factors were zero, none of them would ever learn.
        factors[1:] = [_random(f, key, options["scale"]) for f, key in zip(factors[1:], keys[1:], strict=True)]
        terms.append(Product(tuple(factors)) if len(factors) > 1 else factors[0])
    return Sum(tuple(terms)) if len(terms) > 1 else terms[0]


def _family(name: str, key: jax.Array, shape: tuple[int, int], options: dict[str, Any]) -> StructuredMatrix:
    family = FAMILIES[name]
    return family.init(key, shape, scale=options["scale"], **family.options_from(shape, options))


def _random(matrix: StructuredMatrix, key: jax.Array, scale: float) -> StructuredMatrix:
    """Return the matrix with random numbers in the array that it is linear in, `linear_in`."""
    name = matrix.linear_in
    array = matrix.arrays()[name]
    random = scale * jax.random.normal(jax.random.fold_in(key, 1), array.shape, array.dtype)
    return matrix.with_arrays(**{name: random})
