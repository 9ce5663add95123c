"""The base class of methods that add a structured matrix to the kernels of linear layers."""

import abc
import dataclasses
import math
from typing import Any, ClassVar

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
    """A structured matrix M added to a kernel W: `W + alpha * unit * M` (SURM, arXiv 2406.17740, section 4.1).

    The number `unit` is fixed by the method, such as `1 / rank` for LoRA.

    Attributes:
        alpha: The factor of the update.
        learn_alpha: Whether alpha is trained. It may then start at 0, in which case M does not start at zero.
        dropout: The probability of zeroing an entry of the update's input during training (`adapter_dropout`).
        frozen: The names of the arrays of M that are not trained.
        zero: The name of the array of M that starts at zero. An empty string stands for the name in `M.linear_in`.
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
        """Return the initial M, (in_features, out_features). It is zero, but the gradient of its arrays is not."""

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the factor `unit`, by which the method multiplies M, for shape (in_features, out_features)."""
        del shape
        return 1.0

    def factor(self, shape: tuple[int, int]) -> float:
        """Return the whole factor of M, `alpha * unit`, for shape (in_features, out_features)."""
        return self.alpha * self.unit(shape)

    def start(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return the M with which training starts: that of `init`, or a non-zero matrix if alpha starts at 0."""
        matrix = self.init(key, shape)
        if self.alpha:
            return matrix
        return _away_from_zero(matrix, jax.random.fold_in(key, 1), getattr(self, "scale", None), self.zero)

    def make_part(self, place: Place, key: jax.Array) -> UpdatePart:
        """Return the initial update for one layer.

        Raises:
            UserError: If the output features cannot be divided into `place.parts` equal blocks, or if a setting does
                not fit the shape of the kernel.
        """
        return self.part_with(self._start_in_parts(place, key), place)

    def part_with(self, matrix: StructuredMatrix, place: Place) -> UpdatePart:
        """Return the update for one layer with a given matrix M."""
        kernel = _kernel(place)
        return self.part(
            matrix,
            kernel,
            factor=self.unit(matrix.shape) if self.learn_alpha else self.factor(matrix.shape),
            alpha=self.alpha if self.learn_alpha else None,
            dropout=self.dropout,
            frozen=self.frozen,
            execution=place.execution,
            **self.part_settings(),
        )

    def part_settings(self) -> dict[str, Any]:
        """Return further arguments of the class `part`, which a method with its own class may need."""
        return {}

    def _start_in_parts(self, place: Place, key: jax.Array) -> StructuredMatrix:
        """Return the initial M. For a packed kernel, this is a sum of one matrix for each selected block."""
        m, n = _kernel(place).shape
        shape = (m, n)
        if place.parts == 1:
            return self.start(key, shape)
        if n % place.parts:
            raise UserError(f"its {n} output features cannot be divided into {place.parts} equal parts")
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
    """Return the matrix with random numbers in the array that starts at zero.

    The array is called `zero` or, if `zero` is empty, as `linear_in` says.
    """
    if isinstance(matrix, Sum):
        keys = jax.random.split(key, len(matrix.terms))
        return Sum(tuple(_away_from_zero(term, k, scale, zero) for term, k in zip(matrix.terms, keys, strict=True)))
    arrays = matrix.arrays()
    name = zero or matrix.linear_in
    shape = arrays[name].shape
    return matrix.with_arrays(**{name: (scale or math.prod(shape) ** -0.5) * jax.random.normal(key, shape)})
