"""Sums, products and multiples of structured matrices, which store their operands and no dense matrix.

The expressions `A + B`, `A @ B` and `2.0 * A` return them. `A` and `B` are any structured matrices, including other
sums, products and multiples. Inputs are rows, as everywhere in this package: `Product((A, B))` is the matrix `A @ B`,
and `x @ (A @ B) = (x @ A) @ B`. The paper (SURM, arXiv 2406.17740) writes `W x` with the transposed matrices. With
`W_A = A^T` and `W_B = B^T`, the same product is `W = W_B W_A`.

A sum, product or multiple has the arrays of its operands, under flat names. In the example, `terms_0_factors_1_c` is
the array `c` of the second factor of the first term. Sums, products and multiples can be used wherever a matrix of a
family can. They belong to no family and have no `init` and no `nearest`.

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
from jaxtyping import Array, Float, Int

from surm_jax.errors import UserError
from surm_jax.structured.base import TIMES, Piece, StructuredMatrix, matrix_pytree, sum_pieces


class Composite(StructuredMatrix):
    """Base class of structured matrices that are built from other structured matrices (their parts)."""

    @abc.abstractmethod
    def _parts(self) -> dict[str, StructuredMatrix]:
        """Return the parts by name. Names of arrays begin with the name of their part: `c` becomes `terms_0_c`."""

    @abc.abstractmethod
    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        """Return a matrix of the same class with other parts, given in the order of `_parts`."""

    @property
    def small_residuals(self) -> bool:
        """Whether the backward pass of every part needs no large arrays except its input."""
        return all(part.small_residuals for part in self._parts().values())

    def absorb(self, alpha: float | Float[Array, ""]) -> Self:
        """Return `alpha * M` with the same pytree structure. The first part is multiplied by alpha."""
        first, *others = self._parts().values()
        return self._with_parts([first.absorb(alpha), *others])

    @property
    def linear_in(self) -> str:
        """The name of an array in which `M` is linear: that of the first part, such as `terms_0_c`."""
        name, part = next(iter(self._parts().items()))
        return f"{name}_{part.linear_in}"

    def arrays(self) -> dict[str, Array]:
        """Return the array leaves of all parts. Each name begins with the name of the part, as in `terms_0_c`."""
        return {f"{part}_{name}": leaf for part, m in self._parts().items() for name, leaf in m.arrays().items()}

    def compact(self) -> StructuredMatrix:
        """Return an equal matrix with the fewest parameters, in which every part is compact."""
        return self._with_parts([part.compact() for part in self._parts().values()])

    def _piece(self, name: str) -> list[Piece | str]:
        """Return what a picture shows of one part: a `Piece`, or the factor alpha and a matrix for a `Scaled` part."""
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
        """Check that there is at least one part, and that every part is a structured matrix."""
        if not self._parts():
            raise UserError(f"{type(self).__name__} needs at least one matrix")
        for name, part in self._parts().items():
            if not isinstance(part, StructuredMatrix):
                raise UserError(f"{type(self).__name__}: {name} must be a structured matrix, not {part!r}")

    def _has_shapes(self) -> bool:
        """Return whether all arrays are present, so that the shapes of all parts are known.

        A matrix can stand for its structure only, with None in place of arrays. Some families compute their shape from
        arrays.
        """
        return all(leaf is not None for part in self._parts().values() for leaf in part.arrays().values())


@matrix_pytree
class Sum(Composite):
    """The sum of structured matrices of the same shape, with `x @ (A + B) = x @ A + x @ B`.

    `x @ (A + B)` costs as much as the products of `x` with all terms. A term that is itself a `Sum` is replaced by its
    terms.

    Attributes:
        terms: The matrices that are added, at least one.
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
        """The shape `(in_features, out_features)`, which all terms share."""
        return self.terms[0].shape

    @property
    def T(self) -> "Sum":
        """The transpose, which is the sum of the transposed terms."""
        return Sum(tuple(term.T for term in self.terms))

    def absorb(self, alpha: float | Float[Array, ""]) -> Self:
        """Return `alpha * M` with the same pytree structure. Every term is multiplied by alpha."""
        return self._with_parts([term.absorb(alpha) for term in self.terms])

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the first two terms, and dots if there are more."""
        return sum_pieces(len(self.terms), lambda i: self._piece(f"terms_{i}"))

    def _parts(self) -> dict[str, StructuredMatrix]:
        return {f"terms_{i}": term for i, term in enumerate(self.terms)}

    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        return type(self)(tuple(parts))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return functools.reduce(operator.add, (term._apply(x) for term in self.terms))

    def _dense(self) -> Float[Array, "in out"]:
        return functools.reduce(operator.add, (term._dense() for term in self.terms))

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return functools.reduce(operator.add, (term._rows(ids) for term in self.terms))


@matrix_pytree
class Product(Composite):
    """The product of structured matrices, `M = A @ B`, with `x @ M = (x @ A) @ B`.

    `x @ M` costs as much as the products with all factors together. Intermediate results stay in float32 or float64 and
    are not rounded to the dtype of `x`. The rank of `M` is at most the smallest of the ranks of the factors. A factor
    that is itself a `Product` is replaced by its factors.

    Attributes:
        factors: The matrices that are multiplied, at least one. `x` is multiplied by the first one first.
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
        """False, because the backward pass needs the intermediate results, which are about as large as `x`."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape: in_features of the first factor and out_features of the last factor."""
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    @property
    def T(self) -> "Product":
        """The transpose, which is the product of the transposed factors in reverse order."""
        return Product(tuple(factor.T for factor in reversed(self.factors)))

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: all factors, with multiplication signs between them."""
        return [piece for name in self._parts() for piece in (TIMES, *self._piece(name))][1:]

    def _parts(self) -> dict[str, StructuredMatrix]:
        return {f"factors_{i}": factor for i, factor in enumerate(self.factors)}

    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        return type(self)(tuple(parts))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return functools.reduce(lambda x, factor: factor._apply(x), self.factors, x)

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        first, *others = self.factors
        return functools.reduce(lambda x, factor: factor._apply(x), others, first._rows(ids))

    def _dense(self) -> Float[Array, "in out"]:
        first, *others = self.factors
        # Dense forms are computed in full precision. By default, accelerators multiply in a lower precision.
        with jax.default_matmul_precision("highest"):
            return functools.reduce(lambda rows, factor: factor._apply(rows), others, first._dense())


@matrix_pytree
class Scaled(Composite):
    """A multiple of a structured matrix, `alpha * M`.

    The type of alpha decides whether alpha is trained. A Python or NumPy number is a constant and belongs to the pytree
    structure, like the shape. A JAX array of shape () is one more leaf: it has a gradient, and `arrays()` contains it.
    The code released with arXiv 2406.17740 has such a trained alpha. A constant multiple of a constant multiple is
    stored as a single `Scaled`, with the product of both constants. In the last example, the array `jnp.zeros(())`
    counts as a third parameter, and the constant 0.0 does not.

    Attributes:
        matrix: The structured matrix that is multiplied by alpha.
        alpha: The factor, a number or an array of shape ().

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
        """The shape `(in_features, out_features)` of `matrix`."""
        return self.matrix.shape

    @property
    def small_residuals(self) -> bool:
        """Whether `matrix.small_residuals` is True and alpha is a constant.

        The gradient of a trained alpha needs the whole product of `x` and `matrix`.
        """
        return self._is_constant() and self.matrix.small_residuals

    @property
    def T(self) -> "Scaled":
        """The transpose: the same multiple of the transposed matrix."""
        return Scaled(self.matrix.T, self.alpha)

    def arrays(self) -> dict[str, Array]:
        """Return the array leaves: those of `matrix`, under names such as `matrix_c`, and `alpha` if it is an array."""
        return super().arrays() | ({} if isinstance(self.alpha, float) else {"alpha": self.alpha})

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the factor alpha, a multiplication sign, and the matrix."""
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

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return self.alpha * self.matrix._rows(ids)


def _flattened(
    kind: type[Sum] | type[Product], name: str, parts: Sequence[StructuredMatrix]
) -> tuple[StructuredMatrix, ...]:
    """Return the parts as a tuple. Parts of the class `kind` are replaced by their own parts."""
    try:
        parts = tuple(parts)
    except TypeError:
        raise UserError(f"{kind.__name__}: {name} must be a sequence of structured matrices, not {parts!r}") from None
    return tuple(p for part in parts for p in (getattr(part, name) if isinstance(part, kind) else (part,)))


def _renamed(pieces: list[Piece | str], prefix: str) -> list[Piece | str]:
    """Return what a picture shows of one part, with the names that its arrays have in the whole matrix.

    These names begin with the name of the part.
    """
    return [
        piece
        if isinstance(piece, str)
        else piece._replace(arrays={a: (f"{prefix}_{name}", index) for a, (name, index) in piece.arrays.items()})
        for piece in pieces
    ]


def _by(shape: tuple[int, int]) -> str:
    """Return a shape as text for messages, such as "2 x 3"."""
    return f"{shape[0]} x {shape[1]}"


class _Operators:
    """The operators `+`, `@` and `*` of structured matrices (the protocol `surm_jax.structured.base.Algebra`)."""

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
