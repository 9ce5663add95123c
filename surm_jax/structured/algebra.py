"""Sums, products and multiples of structured matrices, stored as their parts and never as a dense matrix.

`A + B`, `A @ B` and `2.0 * A` build them from any matrices of this package, including other composites. The orientation
is that of the package: `Product((A, B))` is the matrix `A @ B`, and `x @ (A @ B) = (x @ A) @ B`. The paper (SURM, arXiv
2406.17740) writes `W x` with the transposes, so there the same product is `W = W_B W_A`.

A composite has the arrays of its parts, under flat names such as `terms_0_c`, so it can be used wherever a family's
matrix can. Composites are not families: they have no `init` and no `nearest`.

>>> import jax.numpy as jnp
>>> from surm_jax.structured import Circulant, LowRank
>>> C = Circulant(jnp.array([1.0, 2.0, 3.0]), shape=(3, 3))
>>> L = LowRank(down=jnp.array([[1.0], [10.0], [100.0]]), up=jnp.array([[1.0, 0.0, 0.0]]))
>>> (C - 2.0 * L).to_dense()
Array([[  -1.,    2.,    3.],
       [ -17.,    1.,    2.],
       [-198.,    3.,    1.]], dtype=float32)
>>> list((L @ C + L).arrays())
['terms_0_factors_0_down', 'terms_0_factors_0_up', 'terms_0_factors_1_c', 'terms_1_down', 'terms_1_up']
"""

import abc
import dataclasses
import functools
import itertools
import numbers
import operator
from collections.abc import Sequence
from typing import Any, Self

import jax
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.structured.base import TIMES, Piece, StructuredMatrix, matrix_pytree, sum_pieces


class Composite(StructuredMatrix):
    """A matrix made of other matrices, its parts."""

    @abc.abstractmethod
    def _parts(self) -> dict[str, StructuredMatrix]:
        """Return the parts by name. An array is named after its part: `c` of `terms_0` is `terms_0_c`."""

    @abc.abstractmethod
    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        """Return a composite of the same kind with other parts."""

    @property
    def small_residuals(self) -> bool:
        """Whether every part has small residuals."""
        return all(part.small_residuals for part in self._parts().values())

    def absorb(self, alpha: float | Float[Array, ""]) -> Self:
        """Return `alpha * M` with the same structure: the first part absorbs alpha."""
        first, *others = self._parts().values()
        return self._with_parts([first.absorb(alpha), *others])

    @property
    def linear_in(self) -> str:
        """The name of the array in which the first part is linear, such as `terms_0_c`."""
        name, part = next(iter(self._parts().items()))
        return f"{name}_{part.linear_in}"

    def arrays(self) -> dict[str, Array]:
        """Return the array leaves of all parts. Each name begins with its part: `terms_0_c` is `terms[0].c`."""
        return {f"{part}_{name}": leaf for part, m in self._parts().items() for name, leaf in m.arrays().items()}

    def compact(self) -> StructuredMatrix:
        """Return the same composite with each part in its compact form."""
        return self._with_parts([part.compact() for part in self._parts().values()])

    def _piece(self, name: str) -> list[Piece | str]:
        """Return the pieces of a picture that show one part. A `Scaled` part shows its factor first."""
        part = self._parts()[name]
        if isinstance(part, Scaled):
            return [part._sign(), *_renamed(part._piece("matrix"), name)]
        return [Piece(f"\\mathrm{{{type(part).__name__}}}", {a: (f"{name}_{a}", ...) for a in part.arrays()}, part)]

    def _structure(self) -> tuple[Any, ...]:
        return type(self), self._sizes(), *(part._structure() for part in self._parts().values())

    def _replace(self, arrays: dict[str, Array]) -> Self:
        parts = []
        for name, part in self._parts().items():
            mine = {leaf: arrays[f"{name}_{leaf}"] for leaf in part.arrays() if f"{name}_{leaf}" in arrays}
            try:
                parts.append(part.with_arrays(**mine))
            except UserError as error:
                raise UserError(f"{type(self).__name__}, {name}: {error}") from None
        return self._with_parts(parts)

    def _check_parts(self) -> None:
        """Raise `UserError` unless there is at least one part and every part is a structured matrix."""
        if not self._parts():
            raise UserError(f"{type(self).__name__} needs at least one matrix")
        for name, part in self._parts().items():
            if not isinstance(part, StructuredMatrix):
                raise UserError(f"{type(self).__name__}: {name} must be a structured matrix, not {part!r}")

    def _has_shapes(self) -> bool:
        """Return whether all parts have their arrays. Without them, matrices of some families have no shape."""
        return all(leaf is not None for part in self._parts().values() for leaf in part.arrays().values())


@matrix_pytree
class Sum(Composite):
    """The sum of structured matrices of one shape: `x @ (A + B) = x @ A + x @ B`.

    It costs as much as its terms together. A term that is itself a sum is replaced by its terms.

    Attributes:
        terms: One matrix or more.
    """

    terms: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _flattened(Sum, "terms", self.terms))
        self._check_parts()
        if self._has_shapes():
            first, *others = (term.shape for term in self.terms)
            for i, shape in enumerate(others, 1):
                if shape != first:
                    raise UserError(
                        f"Sum: terms must have one shape, but terms[0] is {_by(first)} and terms[{i}] is {_by(shape)}"
                    )

    @property
    def shape(self) -> tuple[int, int]:
        """`(in_features, out_features)` of every term."""
        return self.terms[0].shape

    @property
    def T(self) -> "Sum":
        """The transpose: the sum of the transposes."""
        return Sum(tuple(term.T for term in self.terms))

    def absorb(self, alpha: float | Float[Array, ""]) -> Self:
        """Return `alpha * M` with the same structure: every term absorbs alpha."""
        return self._with_parts([term.absorb(alpha) for term in self.terms])

    def pieces(self) -> list[Piece | str]:
        """Return the pieces of the first terms."""
        return sum_pieces(len(self.terms), lambda i: self._piece(f"terms_{i}"))

    def _parts(self) -> dict[str, StructuredMatrix]:
        return {f"terms_{i}": term for i, term in enumerate(self.terms)}

    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        return type(self)(tuple(parts))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return functools.reduce(operator.add, (term._apply(x) for term in self.terms))

    def _dense(self) -> Float[Array, "in out"]:
        return functools.reduce(operator.add, (term._dense() for term in self.terms))


@matrix_pytree
class Product(Composite):
    """The product of structured matrices, `M = A @ B`: `x @ M = (x @ A) @ B`.

    It costs as much as its factors together. Intermediate results are not rounded to the precision of `x`. Its rank is
    at most the smallest rank of a factor. A factor that is itself a product is replaced by its factors.

    Attributes:
        factors: One matrix or more; `x` is multiplied with the first one first.
    """

    factors: tuple[StructuredMatrix, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", _flattened(Product, "factors", self.factors))
        self._check_parts()
        if self._has_shapes():
            shapes = [factor.shape for factor in self.factors]
            for i, (left, right) in enumerate(itertools.pairwise(shapes)):
                if left[1] != right[0]:
                    raise UserError(
                        f"Product: factors[{i}] is {_by(left)} and factors[{i + 1}] is {_by(right)}: "
                        f"factors[{i + 1}] must have {left[1]} input features"
                    )

    @property
    def small_residuals(self) -> bool:
        """False: the result between two factors is about as large as `x`."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """`(in_features, out_features)`: in_features of the first factor, out_features of the last."""
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    @property
    def T(self) -> "Product":
        """The transpose: the product of the transposes in reverse order."""
        return Product(tuple(factor.T for factor in reversed(self.factors)))

    def pieces(self) -> list[Piece | str]:
        """Return the pieces of all factors."""
        return [piece for name in self._parts() for piece in (TIMES, *self._piece(name))][1:]

    def _parts(self) -> dict[str, StructuredMatrix]:
        return {f"factors_{i}": factor for i, factor in enumerate(self.factors)}

    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        return type(self)(tuple(parts))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return functools.reduce(lambda x, factor: factor._apply(x), self.factors, x)

    def _dense(self) -> Float[Array, "in out"]:
        first, *others = self.factors
        # Dense forms have full precision. By default accelerators would multiply in a lower one.
        with jax.default_matmul_precision("highest"):
            return functools.reduce(lambda rows, factor: factor._apply(rows), others, first._dense())


@matrix_pytree
class Scaled(Composite):
    """A multiple of a structured matrix, `alpha * M`.

    The type of alpha decides whether it is learned. A number (of Python or NumPy) is a constant and part of the
    structure, like a size. An array of shape () is one more leaf: it has a gradient and is listed by `arrays()`, like
    the learnable alpha of the code released with arXiv 2406.17740. A constant multiple of a constant multiple is stored
    as one multiple.

    Attributes:
        matrix: Any structured matrix.
        alpha: A number or an array of shape ().

    >>> import jax.numpy as jnp
    >>> from surm_jax.structured import Circulant
    >>> C = Circulant(jnp.array([1.0, 2.0]), shape=(2, 2))
    >>> -2.0 * C
    Scaled(matrix=Circulant(c=float32[2], shape=(2, 2)), alpha=-2.0)
    >>> (jnp.zeros(()) * C).num_params, (0.0 * C).num_params
    (3, 2)
    """

    matrix: StructuredMatrix
    alpha: float | Float[Array, ""]

    def __post_init__(self) -> None:
        self._check_parts()
        if not isinstance(self.alpha, numbers.Real):
            # alpha may also be None: `with_arrays` can set every array to None.
            self._check_leaf("alpha", ())
            return
        object.__setattr__(self, "alpha", float(self.alpha))
        if isinstance(self.matrix, Scaled) and self.matrix._is_constant():
            object.__setattr__(self, "alpha", self.alpha * self.matrix.alpha)
            object.__setattr__(self, "matrix", self.matrix.matrix)

    @property
    def shape(self) -> tuple[int, int]:
        """`(in_features, out_features)` of the wrapped matrix."""
        return self.matrix.shape

    @property
    def small_residuals(self) -> bool:
        """Whether the matrix has small residuals and alpha is constant: a learned alpha needs the product."""
        return self._is_constant() and self.matrix.small_residuals

    @property
    def T(self) -> "Scaled":
        """The transpose: the same multiple of the transposed matrix."""
        return Scaled(self.matrix.T, self.alpha)

    def arrays(self) -> dict[str, Array]:
        """Return the array leaves: those of the matrix, such as `matrix_c`, and `alpha` if it is an array."""
        return super().arrays() | ({} if isinstance(self.alpha, float) else {"alpha": self.alpha})

    def pieces(self) -> list[Piece | str]:
        """Return the factor and the matrix."""
        return [self._sign(), *self._piece("matrix")]

    def _sign(self) -> str:
        return f"{self.alpha:g}\\,\\times" if isinstance(self.alpha, float) else "\\alpha\\,\\times"

    def _replace(self, arrays: dict[str, Array]) -> "Scaled":
        scaled = super()._replace(arrays)
        if "alpha" not in arrays:
            return scaled
        if isinstance(arrays["alpha"], numbers.Real):
            raise UserError(f"Scaled: alpha must be an array, because it is learned, not {arrays['alpha']!r}")
        return dataclasses.replace(scaled, alpha=arrays["alpha"])

    def _is_constant(self) -> bool:
        return isinstance(self.alpha, float)

    def _children(self) -> dict[str, Any]:
        return {"matrix": self.matrix} if self._is_constant() else {"matrix": self.matrix, "alpha": self.alpha}

    def _sizes(self) -> tuple[Any, ...]:
        return (self.alpha,) if self._is_constant() else ()

    def _parts(self) -> dict[str, StructuredMatrix]:
        return {"matrix": self.matrix}

    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        return type(self)(parts[0], self.alpha)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.alpha * self.matrix._apply(x)

    def _dense(self) -> Float[Array, "in out"]:
        return self.alpha * self.matrix._dense()


def _flattened(
    kind: type[Sum] | type[Product], name: str, parts: Sequence[StructuredMatrix]
) -> tuple[StructuredMatrix, ...]:
    """Return the parts. A part that is itself of this kind is replaced by its own parts."""
    try:
        parts = tuple(parts)
    except TypeError:
        raise UserError(f"{kind.__name__}: {name} must be a sequence of structured matrices, not {parts!r}") from None
    return tuple(p for part in parts for p in (getattr(part, name) if isinstance(part, kind) else (part,)))


def _renamed(pieces: list[Piece | str], prefix: str) -> list[Piece | str]:
    """Return the pieces of a part as pieces of the composite, where the names of arrays have a prefix."""
    return [
        piece
        if isinstance(piece, str)
        else piece._replace(arrays={a: (f"{prefix}_{name}", index) for a, (name, index) in piece.arrays.items()})
        for piece in pieces
    ]


def _by(shape: tuple[int, int]) -> str:
    """Return a shape as text, such as "2 x 3"."""
    return f"{shape[0]} x {shape[1]}"


class _Operators:
    """The operators `+`, `@` and `*` of matrices."""

    @staticmethod
    def add(left: StructuredMatrix, right: StructuredMatrix) -> Sum:
        return Sum((left, right))

    @staticmethod
    def multiply(left: StructuredMatrix, right: StructuredMatrix) -> Product:
        return Product((left, right))

    @staticmethod
    def scale(matrix: StructuredMatrix, factor: float | Float[Array, ""]) -> Scaled:
        return Scaled(matrix, factor)


StructuredMatrix._algebra = _Operators()
