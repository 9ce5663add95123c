"""The methods that put a structured matrix beside the kernels of linear layers."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
from jaxtyping import Array

from surm_jax.errors import UserError
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.methods.settings import at_least
from surm_jax.peft.parts.base import Place
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import Placed, StructuredMatrix, Sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update(PartMethod):
    """A structured matrix beside a kernel: `W + alpha * unit * M` (SURM, arXiv 2406.17740, section 4.1).

    Attributes:
        alpha: The factor of the update.
        learn_alpha: Whether alpha is trained too. It may then start at 0, and the matrix starts away from zero.
        dropout: Probability of zeroing an entry of the update's input while training (`surm_jax.adapter_dropout`).
        frozen: Names of the matrix's arrays that are not trained.
        zero: Name of the array that is zero at the start; empty: the array that the matrix is linear in.
    """

    part: ClassVar[type[UpdatePart]] = UpdatePart
    takes_packed: ClassVar[bool] = True
    target: ClassVar[str] = "qkv"
    frozen: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[str] = ""
    alpha: float = 1.0
    learn_alpha: bool = False
    dropout: float = at_least(0.0, 0, below=1)

    @abc.abstractmethod
    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return a matrix of the given (in_features, out_features) that is zero and can learn."""

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the method's conventional factor of `alpha * M` for (in_features, out_features)."""
        del shape
        return 1.0

    def factor(self, shape: tuple[int, int]) -> float:
        """Return the whole factor of the matrix for (in_features, out_features)."""
        return self.alpha * self.unit(shape)

    def start(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return the matrix that training starts from: `init`, or away from zero where alpha starts at 0."""
        matrix = self.init(key, shape)
        if self.alpha:
            return matrix
        return _away_from_zero(matrix, jax.random.fold_in(key, 1), getattr(self, "scale", None), self.zero)

    def make_part(self, place: Place, key: jax.Array) -> UpdatePart:
        """Return the update of one layer at the start of training.

        Raises:
            UserError: If the kernel has not the parts of the place, or a setting does not fit its sizes.
        """
        return self.part_with(self._start_in_parts(place, key), place)

    def part_with(self, matrix: StructuredMatrix, place: Place) -> UpdatePart:
        """Return the update of one layer with a given matrix."""
        kernel = _kernel(place)
        return self.part(
            matrix,
            kernel,
            factor=self.unit(matrix.shape) if self.learn_alpha else self.factor(matrix.shape),
            alpha=self.alpha if self.learn_alpha else None,
            dropout=self.dropout,
            frozen=self.frozen,
            execution=place.execution,
        )

    def _start_in_parts(self, place: Place, key: jax.Array) -> StructuredMatrix:
        """Return the matrix at the start; for parts of a packed kernel, the sum of their matrices."""
        m, n = _kernel(place).shape
        shape = (m, n)
        if place.parts == 1:
            return self.start(key, shape)
        if n % place.parts:
            raise UserError(f"its {n} output features are not {place.parts} equal parts")
        width = n // place.parts
        blocks = tuple(
            Placed(self.start(jax.random.fold_in(key, part), (m, width)), shape, (0, part * width))
            for part in place.which or range(place.parts)
        )
        return Sum(blocks) if len(blocks) > 1 else blocks[0]

    def _may_be_zero(self, name: str) -> bool:
        return name == "alpha" and self.learn_alpha


def _kernel(place: Place) -> Array:
    if place.kernel is None:
        raise TypeError("an update needs the kernel of a linear layer")
    return place.kernel


def _away_from_zero(matrix: StructuredMatrix, key: jax.Array, scale: float | None, zero: str) -> StructuredMatrix:
    """Return the matrix with random numbers in the array that is zero: `linear_in` unless `zero` names another."""
    if isinstance(matrix, Sum):
        keys = jax.random.split(key, len(matrix.terms))
        return Sum(tuple(_away_from_zero(term, k, scale, zero) for term, k in zip(matrix.terms, keys, strict=True)))
    arrays = matrix.arrays()
    name = zero or matrix.linear_in
    shape = arrays[name].shape
    return matrix.with_arrays(**{name: (scale or math.prod(shape) ** -0.5) * jax.random.normal(key, shape)})
