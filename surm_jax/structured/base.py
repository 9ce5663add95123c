"""Base class of structured matrices: small frozen pytrees that stand for a dense `M` in `y = x @ M`.

Orientation, once for the whole package: `M` has the shape and the orientation of a Flax kernel, `(in_features,
out_features)`. The paper (SURM, arXiv 2406.17740) writes `W x` with `W` of shape (out, in), so `M` is the transpose of
its `W`. The docstring of each family says where the transpose went.

This file holds what all matrices share: argument checks, precision, registration as a pytree, and access to the leaves
by name. Families (`surm_jax.structured.families`) also have a start for training (`init`) and a projection of dense
matrices (`nearest`). Sums, products and multiples (`surm_jax.structured.algebra`) are matrices but not families.
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
from jaxtyping import Array, DTypeLike, Float

from surm_jax.errors import UserError, did_you_mean

Matrix = TypeVar("Matrix", bound="StructuredMatrix")
"""Any subclass of `StructuredMatrix`."""


def static(default: Any = dataclasses.MISSING) -> Any:
    """Declare a dataclass field of a matrix that is static structure, such as a size, and not an array leaf.

    Args:
        default: The field's default, if it has one.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def matrix_pytree(cls: type[Matrix]) -> type[Matrix]:
    """Make a subclass of `StructuredMatrix` a frozen dataclass and a pytree.

    Fields declared with `static()` become structure. All other fields become children, in the order of declaration.
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
        # `register_dataclass` would call the constructor, whose checks would refuse trees that JAX builds of
        # placeholders or of leaves with a leading axis (vmap, jacobians).
        matrix = object.__new__(cls)
        for field, value in zip(cls._leaf_names + cls._size_names, (*children, *structure), strict=True):
            object.__setattr__(matrix, field, value)
        return matrix

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the precision in which matrices are computed: float64 if an operand has it, otherwise float32.

    `jnp.fft` refuses bfloat16 and float16, and sums over thousands of features in half precision lose small terms.

    >>> compute_dtype(jnp.bfloat16, jnp.float32)
    dtype('float32')
    """
    return jnp.dtype(jnp.float64 if any(jnp.dtype(d) == jnp.float64 for d in dtypes) else jnp.float32)


def checked_shape(owner: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return `shape` as `(in_features, out_features)`.

    Args:
        owner: Name of the caller, for the start of the message.
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
    """The functions behind the operators `+`, `@` and `*` of matrices.

    `surm_jax.structured.algebra` defines sums, products and multiples. It imports this file, and installs them here.
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
    """A factor or a term of a matrix, which pictures show beside the whole matrix.

    Attributes:
        label: Name of the piece in TeX, without dollar signs.
        arrays: The source of each array of the piece, by name: an array of the whole matrix and an index into it.
        matrix: The piece as a structured matrix with arrays of these names. None if the piece is a dense matrix, which
            is the only entry of `arrays`.
    """

    label: str
    arrays: dict[str, tuple[str, int | tuple[slice | int, ...] | EllipsisType]]
    matrix: "StructuredMatrix | None" = None


TIMES = "\\times"
"""The multiplication sign between two factors of a picture, in TeX."""


def sum_pieces(total: int, term: Callable[[int], list[Piece | str]], *, most: int = 2) -> list[Piece | str]:
    """Return the pieces of the first terms of a sum, with plus signs between them.

    Args:
        total: Number of terms of the sum.
        term: Function from the number of a term to its pieces.
        most: Largest number of terms to show.
    """
    pieces = [piece for k in range(min(total, most)) for piece in ("+", *term(k))][1:]
    return pieces + ["+\\cdots"] * (total > most)


class StructuredMatrix(abc.ABC):
    """A matrix `M` of shape (in_features, out_features) stored as far fewer numbers, with a fast product `x @ M`.

    Instances are frozen pytrees: the arrays are leaves and the sizes are structure, so they pass through `jit`, `grad`,
    `vmap` and optimisers. The constructor checks its arrays. Trees that JAX builds are not checked. To use a stack of
    matrices, such as the result of `jax.vmap` over `init`, call its methods inside another `jax.vmap`.

    Precision: parameters keep their own dtype. Products and dense forms are computed in `compute_dtype`: float32, or
    float64 if an operand has it.

    `A + B`, `A - B`, `A @ B`, `2.0 * A` and `-A` are matrices again, and stay as structured as their parts
    (`surm_jax.structured.algebra`).
    """

    # NumPy then leaves `number * matrix` to `__rmul__`. Otherwise it would make an array of objects.
    __array_ufunc__ = None

    _algebra: ClassVar[Algebra]
    _leaf_names: ClassVar[tuple[str, ...]]
    _size_names: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:
        # Some classes have `shape` as a field, others compute it from their arrays.
        @property
        def shape(self) -> tuple[int, int]:
            """`(in_features, out_features)`."""

    @property
    @abc.abstractmethod
    def T(self) -> "StructuredMatrix":
        """The transpose, of shape (out_features, in_features), of the same class."""

    @abc.abstractmethod
    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M`. `x` is already checked; `x` and all leaves have the same dtype, float32 or float64."""

    @abc.abstractmethod
    def _dense(self) -> Float[Array, "in out"]:
        """Return the dense `M`. All leaves have the same dtype, float32 or float64."""

    @property
    def small_residuals(self) -> bool:
        """Whether reverse mode stores much less than `x` for the product `x @ M`, not counting `x` itself.

        Such a product is differentiated directly. Any other product is recomputed in the backward pass.
        """
        return False

    @property
    def linear_in(self) -> str:
        """The name of an array in which the matrix is linear: the one that is zero at the start of training."""
        return next(iter(self.arrays()))

    @property
    def num_params(self) -> int:
        """The number of entries of all leaves."""
        return sum(math.prod(leaf.shape) for leaf in self.arrays().values())

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M`, without forming `M`.

        Args:
            x: Any number of leading dimensions, (..., in_features); any real floating-point dtype.

        Returns:
            (..., out_features) in the dtype of `x`.

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
        """Return the dense `M`, (in_features, out_features), in at least float32: for merging, inspection and tests."""
        return self._astype(self._compute_dtype())._dense()

    def absorb(self, alpha: float | Float[Array, ""]) -> Self:
        """Return `alpha * M` with the same structure: alpha is multiplied into the array `linear_in`.

        The operator `alpha * M` instead returns a `Scaled`, which stores alpha separately. Here the structure does not
        change, so alpha may be a traced array of shape (), and one compiled program serves all of its values.
        """
        leaf = self.arrays()[self.linear_in]
        return self._replace({self.linear_in: leaf * jnp.asarray(alpha, leaf.dtype)})

    def compact(self) -> "StructuredMatrix":
        """Return an equal matrix with the fewest stored numbers, for deployment: itself if nothing can be saved."""
        return self

    def pieces(self) -> list[Piece | str]:
        """Return the factors or terms that a picture shows, with TeX signs between them: an empty list by default."""
        return []

    def arrays(self) -> dict[str, Array]:
        """Return the array leaves by name, in the order of the constructor."""
        return self._children()

    def with_arrays(self, **arrays: Any) -> Self:
        """Return a matrix of the same structure with other arrays. Leaves that are not named keep their arrays.

        A leaf may be None. If all leaves are None, the matrix is only its structure: it is hashable, and a later
        `with_arrays` fills it.

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
        """Return the sum `A + B`, stored as its terms."""
        return self._algebra.add(self, other) if isinstance(other, StructuredMatrix) else NotImplemented

    def __sub__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """Return the difference `A - B`, stored as its terms."""
        return self + -other if isinstance(other, StructuredMatrix) else NotImplemented

    def __matmul__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """Return the product `A @ B`, stored as its factors."""
        return self._algebra.multiply(self, other) if isinstance(other, StructuredMatrix) else NotImplemented

    def __mul__(self, factor: float | Float[Array, ""]) -> "StructuredMatrix":
        """Return `factor * M`. A number is a constant factor; an array of shape () is one more leaf."""
        return NotImplemented if isinstance(factor, StructuredMatrix) else self._algebra.scale(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> "StructuredMatrix":
        """Return `-1.0 * M`."""
        return self * -1.0

    def __eq__(self, other: object) -> bool:
        """Return whether both have equal class and sizes and the same array objects. Values are not compared."""
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
        """Return the class and the sizes: a hashable value without the arrays."""
        return type(self), self._sizes()

    def _replace(self, arrays: dict[str, Array]) -> Self:
        return dataclasses.replace(self, **arrays)  # type: ignore[type-var]  # every matrix is a dataclass

    def _check_dimensions(self, **sizes: str) -> None:
        """Raise `UserError` unless each leaf is an array with as many dimensions as its text, such as "(m, r)"."""
        for name, dimensions in sizes.items():
            leaf = getattr(self, name)
            shape = getattr(leaf, "shape", None)
            if shape is None or len(shape) != dimensions.count(",") + 1:
                raise UserError(
                    f"{type(self).__name__}: {name} must be an array of shape {dimensions}, not {shape or leaf!r}"
                )

    def _check_leaf(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise `UserError` unless the leaf is a floating-point array of the expected shape, or None."""
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
    """Return dtype and shape, such as `float32[768]`. Placeholders in pytrees have neither: return their repr."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)
