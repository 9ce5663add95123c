"""Methods whose setting `family` names the family of their matrix, or a sum or product of several families."""

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
    """The settings that determine the family and the initial values of a matrix.

    Attributes:
        family: The name of one of `surm_jax.structured.FAMILIES`, or an expression that combines such names by +
            (sum) and @ (matrix product).
        rank: The rank, for the families that have one. A `Tiled` matrix has about as many parameters as LoRA at this
            rank.
        f: The constant f of f-circulants, by which the entries that wrap around are multiplied.
        scale: The standard deviation of the arrays that are random at the start.
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
                    f" (known: {', '.join(FAMILIES)}; + and @ combine them)"
                )

    def zero_matrix(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return an initial matrix of the given shape. Its entries are zero, but the gradient of its arrays is not."""
        return _zero(self.family, key, shape, {"rank": self.rank, "f": self.f, "scale": self.scale})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredUpdate(_AnyFamily, Update):
    """A matrix of any family, such as `SkewCirculant`, or of a sum or product of families (`+` and `@`).

    `@` binds tighter than `+`. The first factor of a product, which is applied to the input, starts at zero. In this
    example, the Toeplitz matrix has 15 parameters, the circulant 8, and the matrix of rank 2 has 32:

    >>> update = StructuredUpdate(family="Toeplitz @ Circulant + LowRank", rank=2)
    >>> update.init(jax.random.key(0), (8, 8)).num_params
    55
    """

    name: ClassVar[str] = "structured"

    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return an initial matrix of the given shape. It equals zero as a whole, but its gradient does not vanish."""
        return self.zero_matrix(key, shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredBranch(_AnyFamily, Branch):
    """`X + gelu(X M) + b` with M of any family, or of a sum or product of families, as in the method `structured`."""

    name: ClassVar[str] = "structured_adapter"

    def init_branch(self, key: jax.Array, width: int) -> tuple[StructuredMatrix]:
        """Return an initial matrix. It equals zero as a whole, but its gradient does not vanish."""
        return (self.zero_matrix(key, (width, width)),)


def _zero(expression: str, key: jax.Array, shape: tuple[int, int], options: dict[str, Any]) -> StructuredMatrix:
    """Return an initial matrix for an expression such as `A @ B + C`. It equals zero, but its gradient is not zero."""
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
        # Only the first factor may be zero: if all factors were zero, all gradients would stay zero.
        factors[1:] = [_random(f, key, options["scale"]) for f, key in zip(factors[1:], keys[1:], strict=True)]
        terms.append(Product(tuple(factors)) if len(factors) > 1 else factors[0])
    return Sum(tuple(terms)) if len(terms) > 1 else terms[0]


def _family(name: str, key: jax.Array, shape: tuple[int, int], options: dict[str, Any]) -> StructuredMatrix:
    family = FAMILIES[name]
    return family.init(key, shape, scale=options["scale"], **family.options_from(shape, options))


def _random(matrix: StructuredMatrix, key: jax.Array, scale: float) -> StructuredMatrix:
    """Return the matrix with random numbers in the array that starts at zero (`linear_in`)."""
    name = matrix.linear_in
    array = matrix.arrays()[name]
    random = scale * jax.random.normal(jax.random.fold_in(key, 1), array.shape, array.dtype)
    return matrix.with_arrays(**{name: random})
