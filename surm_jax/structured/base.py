"""What every structured matrix is: a small frozen pytree that stands for a dense `M` in `y = x @ M`.

Orientation, once for the whole package: `M` has the shape and the orientation of a Flax kernel, `(in_features,
out_features)`. The paper (SURM, arXiv 2406.17740) writes `W x` with `W` of shape (out, in), so that `M` is the
transpose of its `W`; each family says in its docstring where the transpose went.

A new family is one file: a subclass of `StructuredMatrix` under the `family` decorator. It names its array leaves as
the paper does and fills `T`, `_apply` and `_dense`, which every matrix has, and the class methods `init` and `nearest`,
which only a family has (`Family`). Sums, products and scalings (`surm_jax.structured.algebra`) are matrices without
being families. Everything that is common to all of them (argument checks, precision, pytree registration, access to
the leaves by name) is here.
"""

import abc
import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError, did_you_mean

Matrix = TypeVar("Matrix", bound="StructuredMatrix")
"""Any subclass of `StructuredMatrix`, the same in what is taken and in what is returned."""


class Family(Protocol):
    """What the class of a family offers besides the methods of its matrices: a start and a projection."""

    __name__: str

    def init(
        self, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32, **options: Any
    ) -> "StructuredMatrix":
        """A zero matrix that can learn: a family with several factors draws one of them and sets the others to zero.

        Args:
            key: Source of the random factor.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of the random factor. The speed of the first steps goes with its square.
            dtype: Type of the parameters.
            **options: What the family needs besides, such as a rank.

        Raises:
            UserError: The shape or an option is not possible.
        """

    def nearest(self, dense: Float[Array, "in out"], **options: Any) -> "StructuredMatrix":
        """The member of the family nearest to `dense` in the Frobenius norm.

        Args:
            dense: The target. Calculated in, and returned as, at least float32.
            **options: What the family needs besides, such as a rank.

        Raises:
            UserError: The target is not a floating-point matrix, or an option is not possible.
        """


FAMILIES: dict[str, Family] = {}
"""Every family by its class name. The test suite fails when one of them has no test case."""


def static() -> Any:
    """A dataclass field that is part of a matrix's structure (a size), not one of its array leaves."""
    return dataclasses.field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def matrix_pytree(cls: type[Matrix]) -> type[Matrix]:
    """Makes a subclass of `StructuredMatrix` a frozen dataclass and a pytree.

    Fields declared with `static()` become structure, all others its children, in the order of their declaration.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)
    cls._size_names = tuple(f.name for f in fields if f.metadata.get("static"))
    cls._leaf_names = tuple(f.name for f in fields if not f.metadata.get("static"))

    def flatten(matrix: Matrix) -> tuple[list[Any], tuple[Any, ...]]:
        return list(matrix._children().values()), matrix._sizes()

    def flatten_with_keys(matrix: Matrix) -> tuple[list[Any], tuple[Any, ...]]:
        return [(jax.tree_util.GetAttrKey(name), c) for name, c in matrix._children().items()], matrix._sizes()

    def unflatten(structure: tuple[Any, ...], children: Sequence[Any]) -> Matrix:
        # Not through the constructor, as `register_dataclass` would: JAX also builds trees of placeholders and of
        # leaves with a leading axis (vmap, jacobians), and the constructor's checks would refuse them.
        matrix = object.__new__(cls)
        for field, value in zip(cls._leaf_names + cls._size_names, (*children, *structure), strict=True):
            object.__setattr__(matrix, field, value)
        return matrix

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def family(cls: type[Matrix]) -> type[Matrix]:
    """Make a subclass of `StructuredMatrix` a frozen dataclass and a pytree, and register it under its class name.

    Fields declared with `static()` become structure, all others array leaves, in the order of their declaration.

    Args:
        cls: The class. `FAMILIES[cls.__name__]` is the class afterwards; configurations and messages use this name.

    Raises:
        UserError: The name is taken by another class, or the class lacks `init` or `nearest`.
    """
    if cls.__name__ in FAMILIES:
        raise UserError(
            f"there already is a family {cls.__name__} ({FAMILIES[cls.__name__].__module__}): rename this one"
        )
    for method in ("init", "nearest"):
        if not hasattr(cls, method):
            raise UserError(f"{cls.__name__} lacks the class method {method}(), which every family has")
    FAMILIES[cls.__name__] = cls = matrix_pytree(cls)
    return cls


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """The precision in which matrices of this package calculate: float64 when an operand has it, otherwise float32.

    `jnp.fft` refuses bfloat16 and float16, and a sum over thousands of features in them loses the small terms.

    >>> compute_dtype(jnp.bfloat16, jnp.float32)
    dtype('float32')
    """
    return jnp.dtype(jnp.float64 if any(jnp.dtype(d) == jnp.float64 for d in dtypes) else jnp.float32)


def scaled_normal(
    key: PRNGKeyArray, shape: tuple[int, ...], scale: float | Float[ArrayLike, ""], dtype: DTypeLike
) -> Array:
    """`scale * N(0, 1)` in `dtype`, whatever the type of the scale: a NumPy number would widen half precision."""
    return jnp.asarray(scale, dtype) * jax.random.normal(key, shape, dtype)


def checked_shape(owner: str, shape: Sequence[int]) -> tuple[int, int]:
    """Returns `shape` as `(in_features, out_features)`.

    Args:
        owner: Who asks; the message starts with it.
        shape: Two positive integers.

    Raises:
        UserError: It is anything else.
    """
    try:
        m, n = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        m = n = 0
    if m < 1 or n < 1:
        raise UserError(f"{owner}: shape must be (in_features, out_features), two positive integers, not {shape!r}")
    return m, n


def checked_dense(owner: str, dense: ArrayLike) -> Float[Array, "in out"]:
    """Returns the target of a projection as a floating-point matrix of at least float32.

    Args:
        owner: Who asks; the message starts with it.
        dense: The matrix to approximate, (in_features, out_features).

    Raises:
        UserError: It is not a non-empty real floating-point matrix.
    """
    dense = jnp.asarray(dense)
    if dense.ndim != 2 or 0 in dense.shape or not jnp.issubdtype(dense.dtype, jnp.floating):
        raise UserError(
            f"{owner}: nearest() takes a non-empty floating-point matrix (in_features, out_features), "
            f"not {dense.dtype} of shape {dense.shape}"
        )
    return dense.astype(compute_dtype(dense.dtype))


class Algebra(Protocol):
    """What the operators of matrices do.

    `surm_jax.structured.algebra` sets it: sums, products and multiples are matrices themselves, so that they stand
    above this file.
    """

    def add(self, left: "StructuredMatrix", right: "StructuredMatrix") -> "StructuredMatrix":
        """Returns `left + right`."""
        ...

    def multiply(self, left: "StructuredMatrix", right: "StructuredMatrix") -> "StructuredMatrix":
        """Returns `left @ right`."""
        ...

    def scale(self, matrix: "StructuredMatrix", factor: float | Float[Array, ""]) -> "StructuredMatrix":
        """Returns `factor * matrix`."""
        ...


class StructuredMatrix(abc.ABC):
    """A matrix `M` of shape (in_features, out_features) held as far fewer numbers, with a fast product `x @ M`.

    Instances are frozen pytrees: the arrays are leaves, the sizes are structure, so they pass through `jit`, `grad`,
    `vmap` and optimisers as they are. The constructor checks its arrays; trees that JAX itself builds are not checked
    again, and a stack of matrices (`jax.vmap` of `init`) is used inside another `jax.vmap`.

    Precision: parameters keep their own dtype. Products and dense forms are calculated in `compute_dtype`: float32, or
    float64 when an operand has it.

    `A + B`, `A - B`, `A @ B`, `2.0 * A` and `-A` are matrices again, and stay as structured as their parts
    (`surm_jax.structured.algebra`).

    Attributes:
        shape: `(in_features, out_features)`.
        lean: Whether what reverse mode keeps of the product is small beside `x`, so that it need not be computed again.
    """

    # Makes numpy leave `number * matrix` to the matrix, instead of trying it on an array of objects.
    __array_ufunc__ = None

    shape: tuple[int, int]
    lean: ClassVar[bool] = False
    _algebra: ClassVar[Algebra]
    _leaf_names: ClassVar[tuple[str, ...]]
    _size_names: ClassVar[tuple[str, ...]]

    @property
    @abc.abstractmethod
    def T(self) -> "StructuredMatrix":
        """The transpose, of shape (out_features, in_features), of the same class."""

    @abc.abstractmethod
    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x @ M` for an `x` that is checked; it and every leaf have one dtype, float32 or float64."""

    @abc.abstractmethod
    def _dense(self) -> Float[Array, "in out"]:
        """`M`; every leaf has one dtype, float32 or float64."""

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """`x @ M`, without forming `M`.

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
        """`M` itself, (in_features, out_features), in at least float32: for merging, inspection and tests."""
        return self._astype(self._compute_dtype())._dense()

    def times(self, alpha: float | Float[Array, ""]) -> Self:
        """`alpha * M` with the same structure: the array `linear_in` is multiplied.

        Unlike `alpha * M`, which keeps alpha as a part of its own. An array of shape () may be anything that JAX
        traces: a scale that is switched while a compiled program stays.
        """
        leaf = self.arrays()[self.linear_in]
        return self._replace({self.linear_in: leaf * jnp.asarray(alpha, leaf.dtype)})

    def compact(self) -> "StructuredMatrix":
        """The same matrix with the fewest stored numbers, for deployment; itself where nothing can be saved."""
        return self

    @property
    def linear_in(self) -> str:
        """The name of one array in which the matrix is linear: the one that is zero at the start of training."""
        return next(iter(self.arrays()))

    @property
    def num_params(self) -> int:
        """How many numbers the leaves hold."""
        return sum(math.prod(leaf.shape) for leaf in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The array leaves by name, in the order of the constructor."""
        return self._children()

    def with_arrays(self, **arrays: Array) -> Self:
        """The same structure with other arrays; leaves that are not named stay as they are.

        With every leaf None it is an empty matrix: hashable structure, to be filled by `with_arrays` later.

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
        """The sum `A + B`, held as its terms."""
        return self._algebra.add(self, other) if isinstance(other, StructuredMatrix) else NotImplemented

    def __sub__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """The difference `A - B`, held as its terms."""
        return self + -other if isinstance(other, StructuredMatrix) else NotImplemented

    def __matmul__(self, other: "StructuredMatrix") -> "StructuredMatrix":
        """The product `A @ B`, held as its factors."""
        return self._algebra.multiply(self, other) if isinstance(other, StructuredMatrix) else NotImplemented

    def __mul__(self, factor: float | Float[Array, ""]) -> "StructuredMatrix":
        """The multiple by a number, which is constant, or by an array of shape (), which is one more leaf."""
        return NotImplemented if isinstance(factor, StructuredMatrix) else self._algebra.scale(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> "StructuredMatrix":
        """The multiple by -1."""
        return self * -1.0

    def __eq__(self, other: object) -> bool:
        """Same class, same sizes and the very same arrays: values are not compared, so that it is static."""
        if type(self) is not type(other):
            return NotImplemented
        theirs = other.arrays()
        return self._structure() == other._structure() and all(
            leaf is theirs[name] for name, leaf in self.arrays().items()
        )

    def __hash__(self) -> int:
        return hash(self._structure())

    def __repr__(self) -> str:
        fields = (f"{f.name}={_describe(getattr(self, f.name))}" for f in dataclasses.fields(self))
        return f"{type(self).__name__}({', '.join(fields)})"

    def _children(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._leaf_names}

    def _sizes(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._size_names)

    def _structure(self) -> tuple[Any, ...]:
        """All but the arrays, hashable."""
        return type(self), self._sizes()

    def _replace(self, arrays: dict[str, Array]) -> Self:
        return dataclasses.replace(self, **arrays)

    def _check_dimensions(self, **sizes: str) -> None:
        """Raises `UserError` unless each leaf is an array with the dimensions that are named, such as "(m, r)"."""
        for name, dimensions in sizes.items():
            leaf = getattr(self, name)
            shape = getattr(leaf, "shape", None)
            if shape is None or len(shape) != dimensions.count(",") + 1:
                raise UserError(
                    f"{type(self).__name__}: {name} must be an array of shape {dimensions}, not {shape or leaf!r}"
                )

    def _check_leaf(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises `UserError` unless the leaf is a floating-point array of the expected shape, or None."""
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
    """`float32[768]` for whatever has a shape and a dtype, otherwise its repr (placeholders in pytrees)."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)
