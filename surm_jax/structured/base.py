"""Base class of structured matrices: small frozen pytrees that represent a dense matrix `M` in `y = x @ M`.

One orientation holds in the whole package: `M` has the shape and the orientation of a Flax kernel, `(in_features,
out_features)`. The paper (SURM, arXiv 2406.17740) writes `W x` with `W` of shape (out_features, in_features), so `M` is
the transpose of the paper's `W`. The docstring of each family shows the transposed formula.

This file holds what all structured matrices share: the checks of arguments, the dtype of computations, the registration
as a pytree, and the access to array leaves by name. The families (`surm_jax.structured.families`) add `init`, which
returns the matrix with which training starts, and `nearest`, which projects a dense matrix onto the family. Sums,
products and multiples (`surm_jax.structured.algebra`) are structured matrices too, but have no `init` and no `nearest`.
"""

import abc
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from surm_jax.errors import UserError, did_you_mean
from surm_jax.structured.products.rows import by_unit_vectors

Matrix = TypeVar("Matrix", bound="StructuredMatrix")
"""Any subclass of `StructuredMatrix`."""


def static(default: Any = dataclasses.MISSING) -> Any:
    """Return a dataclass field for an attribute that belongs to the pytree structure and is no array, such as a shape.

    Args:
        default: The default value of the field. Without it, the constructor requires a value.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def matrix_pytree(cls: type[Matrix]) -> type[Matrix]:
    """Turn a subclass of `StructuredMatrix` into a frozen dataclass and a pytree. Use this function as a decorator.

    Fields declared with `static()` become part of the pytree structure. All other fields become children of the pytree,
    in the order in which the class declares them.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # the line above makes it a dataclass
    cls._size_names = tuple(f.name for f in fields if f.metadata.get("static"))
    cls._leaf_names = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(matrix: Matrix) -> tuple[list[Any], tuple[Any, ...]]:
        return list(matrix._children().values()), matrix._sizes()

    def flatten_with_keys(matrix: Matrix) -> tuple[list[Any], tuple[Any, ...]]:
        return [(jax.tree_util.GetAttrKey(name), c) for name, c in matrix._children().items()], matrix._sizes()

    def unflatten(structure: tuple[Any, ...], children: Iterable[Any]) -> Matrix:
        # `jax.tree_util.register_dataclass` would call the constructor. Its checks would reject the pytrees that JAX
        # builds with placeholders as leaves, or with leaves that have an extra leading axis (vmap, Jacobians).
        matrix = object.__new__(cls)
        for field, value in zip(cls._leaf_names + cls._size_names, (*children, *structure), strict=True):
            object.__setattr__(matrix, field, value)
        return matrix

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the dtype in which products and dense forms are computed: float64 if an operand has it, else float32.

    Half precision is never used, because `jnp.fft` does not accept bfloat16 and float16, and because half-precision
    sums over thousands of features lose small terms.

    >>> compute_dtype(jnp.bfloat16, jnp.float32)
    dtype('float32')
    """
    return jnp.dtype(jnp.float64 if any(jnp.dtype(d) == jnp.float64 for d in dtypes) else jnp.float32)


def checked_shape(owner: str, shape: Sequence[int]) -> tuple[int, int]:
    """Check a shape, and return it as the tuple `(in_features, out_features)` of Python integers.

    Args:
        owner: Name of the calling class or function, with which the error message begins.
        shape: Two positive integers.

    Raises:
        UserError: `shape` is not two positive integers.
    """
    try:
        m, n = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        m = n = 0
    if m < 1 or n < 1:
        raise UserError(f"{owner}: shape must be (in_features, out_features), two positive integers, not {shape!r}")
    return m, n


class Algebra(Protocol):
    """The functions behind the operators `+`, `@` and `*` of structured matrices, as a protocol.

    `surm_jax.structured.algebra` implements them and assigns them to `StructuredMatrix._algebra`. This file cannot
    import that module, because that module imports this file.
    """

    def add(self, left: "StructuredMatrix", right: "StructuredMatrix") -> "StructuredMatrix":
        """Return `left + right`."""
        ...

    def multiply(self, left: "StructuredMatrix", right: "StructuredMatrix") -> "StructuredMatrix":
        """Return `left @ right`."""
        ...

    def scale(self, matrix: "StructuredMatrix", factor: float | Float[Array, ""]) -> "StructuredMatrix":
        """Return `factor * matrix`."""
        ...


class Piece(NamedTuple):
    """One factor or term of a structured matrix, which a picture of the matrix shows separately.

    Attributes:
        label: Name of the factor or term in TeX, without dollar signs.
        arrays: Where the arrays of the piece come from. Each entry maps the name of one array of the piece to a pair:
            the name of an array of the whole matrix, and an index into that array.
        matrix: The piece as a structured matrix whose arrays have the names in `arrays`. None if the piece is a dense
            matrix. In this case `arrays` has a single entry, the dense matrix itself.
    """

    label: str
    arrays: dict[str, tuple[str, int | tuple[slice | int, ...] | EllipsisType]]
    matrix: "StructuredMatrix | None" = None


TIMES = "\\times"
"""TeX of the multiplication sign that a picture shows between two factors."""


def sum_pieces(total: int, term: Callable[[int], list[Piece | str]], *, most: int = 2) -> list[Piece | str]:
    """Return what a picture shows of a sum: its first `most` terms with plus signs, and dots for the others.

    Args:
        total: Number of terms in the sum.
        term: Function that takes the index of a term and returns the list of its pieces and TeX signs.
        most: Largest number of terms to show.
    """
    pieces = [piece for k in range(min(total, most)) for piece in ("+", *term(k))][1:]
    return pieces + ["+\\cdots"] * (total > most)


class StructuredMatrix(abc.ABC):
    """A matrix `M` of shape (in_features, out_features) with few parameters and a fast product `x @ M`.

    Instances are frozen pytrees: the arrays are leaves, and static fields, such as the shape, belong to the pytree
    structure. So they can be passed through `jit`, `grad`, `vmap` and optimisers. In a stack of matrices, every leaf
    has a leading axis: call its methods inside `jax.vmap`. The constructor checks the arrays; JAX does not call it when
    it unflattens a pytree.

    Parameters keep their own dtype. Products and dense forms are computed in the dtype that `compute_dtype` returns:
    float64 if an operand has it, otherwise float32.

    `A + B`, `A - B`, `A @ B`, `2.0 * A` and `-A` are structured matrices too (`surm_jax.structured.algebra`).
    """

    # With this attribute, NumPy leaves `number * matrix` to `__rmul__`. Otherwise it would return an object array.
    __array_ufunc__ = None

    _algebra: ClassVar[Algebra]
    _leaf_names: ClassVar[tuple[str, ...]]
    _size_names: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:
        # Some classes have `shape` as a field, others compute it from their arrays.
        @property
        def shape(self) -> tuple[int, int]:
            """The shape `(in_features, out_features)` of `M`."""

    @property
    @abc.abstractmethod
    def T(self) -> "StructuredMatrix":
        """The transpose: a matrix of the same class, of shape (out_features, in_features)."""

    @abc.abstractmethod
    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M`. `x` is checked, and has the dtype of all leaves, float32 or float64."""

    @abc.abstractmethod
    def _dense(self) -> Float[Array, "in out"]:
        """Return the dense `M`. All leaves have the same dtype, float32 or float64."""

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        """Return the rows of `M` with the indices `ids`. Families with a cheaper way override this method."""
        return by_unit_vectors(self._apply, self.shape, self._compute_dtype(), ids)

    @property
    def small_residuals(self) -> bool:
        """Whether the backward pass of `x @ M` needs no arrays of the size of `x` except `x` itself.

        If not, such arrays are computed again in the backward pass and not stored
        (`surm_jax.structured.products.execution`).
        """
        return False

    @property
    def linear_in(self) -> str:
        """The name of an array in which `M` is linear while the other arrays are fixed. `init` sets it to zero."""
        return next(iter(self.arrays()))

    @property
    def num_params(self) -> int:
        """The number of parameters, which is the sum of the sizes of all array leaves."""
        return sum(math.prod(leaf.shape) for leaf in self.arrays().values())

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return the product `x @ M`.

        Args:
            x: Array of shape (..., in_features), with any number of leading dimensions and any floating-point dtype.

        Returns:
            An array of shape (..., out_features) in the dtype of `x`.

        Raises:
            UserError: `x` is not floating point, or its last dimension is not in_features.
        """
        x = jnp.asarray(x)
        m, n = self.shape
        if x.ndim == 0 or x.shape[-1] != m:
            raise UserError(
                f"{type(self).__name__}.apply: x must end in the matrix's {m} input features ({m} x {n}), "
                f"but has shape {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{type(self).__name__}.apply: x must be real floating point, not {x.dtype}")
        dtype = self._compute_dtype(x.dtype)
        return self._astype(dtype)._apply(x.astype(dtype)).astype(x.dtype)

    def to_dense(self) -> Float[Array, "in out"]:
        """Return `M` as a dense array of shape (in_features, out_features), in float32 or float64.

        It serves to merge `M` into a kernel, and to inspect `M`.
        """
        return self._astype(self._compute_dtype())._dense()

    def absorb(self, alpha: float | Float[Array, ""]) -> Self:
        """Return `alpha * M` with the same pytree structure. Only the array named `linear_in` is multiplied by alpha.

        So alpha may be a traced array of shape (), and one compiled program serves all its values. The operator `alpha
        * M` instead returns a `Scaled` matrix, which stores alpha separately.
        """
        leaf = self.arrays()[self.linear_in]
        return self._replace({self.linear_in: leaf * jnp.asarray(alpha, leaf.dtype)})

    def compact(self) -> "StructuredMatrix":
        """Return an equal matrix with the fewest parameters, for deployment. By default it is this matrix itself."""
        return self

    def pieces(self) -> list[Piece | str]:
        """Return the factors or terms that `surm_jax.structured.analysis.draw` shows to the left of the whole matrix.

        The list holds a `Piece` for each factor or term, and TeX strings for the signs between them. By default it is
        empty, and a picture shows only the whole matrix.
        """
        return []

    def arrays(self) -> dict[str, Array]:
        """Return the array leaves by name, in the order of the constructor's arguments."""
        return self._children()

    def with_arrays(self, **arrays: Any) -> Self:
        """Return a copy of the matrix with other arrays. Leaves that are not named keep their arrays.

        An array may be None. A matrix in which all arrays are None represents only the structure: it equals every other
        such matrix of the same structure, and has the same hash.

        Args:
            **arrays: New arrays, under the names that `arrays()` returns.

        Raises:
            UserError: A name is not one of this matrix's leaves, or an array has the wrong shape.
        """
        known = self.arrays()
        for name in arrays:
            if name not in known:
                raise UserError(
                    f"{type(self).__name__} has no array {name!r}{did_you_mean(name, known)}; "
                    f"its arrays are {', '.join(known)}"
                )
        return self._replace(arrays)

    def __add__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """Return `A + B` as a `Sum`, which stores both terms."""
        return self._algebra.add(self, other) if isinstance(other, StructuredMatrix) else NotImplemented

    def __sub__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """Return `A - B` as a `Sum`, which stores the terms `A` and `-B`."""
        return self + -other if isinstance(other, StructuredMatrix) else NotImplemented

    def __matmul__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """Return `A @ B` as a `Product`, which stores both factors."""
        return self._algebra.multiply(self, other) if isinstance(other, StructuredMatrix) else NotImplemented

    def __mul__(self, factor: float | Float[Array, ""]) -> "StructuredMatrix":
        """Return `factor * M` as a `Scaled` matrix.

        A Python or NumPy number becomes a constant in the pytree structure. A JAX array of shape () becomes one more
        leaf, which can be trained.
        """
        return NotImplemented if isinstance(factor, StructuredMatrix) else self._algebra.scale(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> "StructuredMatrix":
        """Return `-1.0 * M` as a `Scaled` matrix."""
        return self * -1.0

    def __eq__(self, other: object) -> bool:
        """Return whether both matrices have the same class, equal static fields and identical array objects.

        The values of the arrays are not compared.
        """
        if type(self) is not type(other):
            return NotImplemented
        theirs = other.arrays()
        return self._structure() == other._structure() and all(
            leaf is theirs[name] for name, leaf in self.arrays().items()
        )

    def __hash__(self) -> int:
        return hash(self._structure())

    def __repr__(self) -> str:
        fields = (f"{name}={_describe(getattr(self, name))}" for name in (*self._leaf_names, *self._size_names))
        return f"{type(self).__name__}({', '.join(fields)})"

    def _children(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._leaf_names}

    def _sizes(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._size_names)

    def _structure(self) -> tuple[Any, ...]:
        """Return what does not depend on the arrays, the class and the static fields, as a hashable value."""
        return type(self), self._sizes()

    def _replace(self, arrays: dict[str, Array]) -> Self:
        return dataclasses.replace(self, **arrays)  # type: ignore[type-var]  # every matrix is a dataclass

    def _check_dimensions(self, **sizes: str) -> None:
        """Check that each named leaf is an array with the expected number of dimensions, or raise a `UserError`.

        Args:
            **sizes: The expected shape of each leaf as text, such as "(m, r)" for an array with two dimensions.
        """
        for name, dimensions in sizes.items():
            leaf = getattr(self, name)
            shape = getattr(leaf, "shape", None)
            if shape is None or len(shape) != dimensions.count(",") + 1:
                raise UserError(
                    f"{type(self).__name__}: {name} must be an array of shape {dimensions}, not {shape or leaf!r}"
                )

    def _check_leaf(self, name: str, expected: tuple[int, ...]) -> None:
        """Check that the leaf is None or a floating-point array of the expected shape, or raise a `UserError`."""
        leaf = getattr(self, name)
        if leaf is None:
            return
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise UserError(f"{type(self).__name__}: {name} must be an array, not {leaf!r}")
        if tuple(leaf.shape) != expected:
            raise UserError(f"{type(self).__name__}: {name} must have shape {expected}, not {tuple(leaf.shape)}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"{type(self).__name__}: {name} must be real floating point, not {leaf.dtype}")

    def _compute_dtype(self, *others: DTypeLike) -> jnp.dtype:
        return compute_dtype(*(leaf.dtype for leaf in self.arrays().values()), *others)

    def _astype(self, dtype: DTypeLike) -> Self:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), self)


def _describe(leaf: Any) -> str:
    """Return a leaf as text: dtype and shape of an array, such as `float32[768]`, or the repr of another object."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)
