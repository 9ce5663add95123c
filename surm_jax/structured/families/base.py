"""Base class of the families of structured matrices, and the registry of all families.

A family is the set of all matrices that one formula describes, such as all circulant matrices. One class implements it.
To add a family, write a file with a subclass of `Family`, and decorate the class with `family`. Importing the file
registers it. Name the array leaves as in the paper that proposes the family. The class implements `T`, `_apply`,
`_dense`, `init` and `nearest`. If `init` and `nearest` take options, such as a rank, it also lists their names in
`option_names`, chooses their values for a given largest number of parameters in `options_within`, and for benchmarks in
`typical_options`. All other code uses only these members.
"""

import abc
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix, checked_shape, compute_dtype, matrix_pytree, static

F = TypeVar("F", bound="Family")
"""Any subclass of `Family`."""


class Family(StructuredMatrix):
    """Base class of all families: structured matrices with the class methods `init` and `nearest`.

    `init` returns the matrix with which training starts, and `nearest` projects a dense matrix onto the family.

    Attributes:
        option_names: The names of the options of `init` and `nearest`. A matrix has attributes of the same names.
        searches: Whether `nearest` is an iterative search. If so, it also takes the arguments `steps` and `progress` of
            `surm_jax.structured.refine`.
    """

    option_names: ClassVar[tuple[str, ...]] = ()
    searches: ClassVar[bool] = False
    _title: ClassVar[str] = ""

    @classmethod
    @abc.abstractmethod
    def init(cls, *args: Any, **options: Any) -> Self:
        """Return the matrix with which training starts. It is zero, but the gradient of its arrays is not.

        If there are several arrays, one is zero and the others are random.

        The arguments are `init(key, shape, *, scale, dtype=float32, **options)`:

        - key: Random key for the random arrays.
        - shape: `(in_features, out_features)`.
        - scale: Standard deviation of the random arrays. If there are two arrays, the change of the matrix in the first
          step of gradient descent is proportional to the square of the scale.
        - dtype: Dtype of the parameters.
        - options: Options of the family, such as a rank.

        Raises:
            UserError: The shape or an option is not possible.
        """

    @classmethod
    @abc.abstractmethod
    def nearest(cls, *args: Any, **options: Any) -> Self:
        """Return the member of the family nearest to a dense matrix in the Frobenius norm.

        The arguments are `nearest(dense, **options)`. A family with `searches = True` also takes `steps` and
        `progress`, and returns the nearest matrix that its search finds.

        - dense: The matrix to approximate, (in_features, out_features). The result is in float32 or float64.
        - options: As in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or an option is not possible.
        """

    @property
    def title(self) -> str:
        """The name of the family in tables and pictures, such as "low rank" for `LowRank`."""
        return self._title or re.sub("(?<=[a-z])(?=[A-Z])", " ", type(self).__name__).lower()

    def options(self) -> dict[str, Any]:
        """Return the options of this matrix by name, such as `{"rank": 4}`. `init` and `nearest` take them."""
        return {name: getattr(self, name) for name in self.option_names}

    def spectrum(self) -> Complex[np.ndarray, " n"] | None:
        """Return the eigenvalues if a Fourier transform gives them and the matrix is normal, otherwise None.

        The singular values of a normal matrix are the absolute values of its eigenvalues.
        """
        return None

    @classmethod
    def options_from(cls, shape: tuple[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the options of this family from settings that all families share, for a matrix of the given shape.

        Args:
            shape: `(in_features, out_features)`.
            settings: Values of options by name, such as `rank`. Options of other families are ignored.
        """
        del shape
        return {name: settings[name] for name in cls.option_names if name in settings}

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the options that give the most parameters within a budget, or None if no options stay within it.

        Args:
            shape: `(in_features, out_features)`.
            budget: Largest number of parameters.
        """
        return cls._if_within(shape, budget, {})

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the sets of options with which the benchmarks measure the speed of a matrix of this shape.

        The first set is the most common choice.
        """
        del shape
        return ({},)

    @classmethod
    def count(cls, shape: tuple[int, int], **options: Any) -> int:
        """Return the number of parameters of a matrix with this shape and these options, without allocating arrays.

        Raises:
            UserError: The shape or an option is not possible.
        """
        return cls._abstract(shape, options).num_params

    @classmethod
    def random(
        cls, shape: tuple[int, int], *, scale: float = 1.0, dtype: DTypeLike = jnp.float32, **options: Any
    ) -> Self:
        """Return a matrix with random parameters, `scale * N(0, 1)`. Every call draws the same random numbers.

        Args:
            shape: `(in_features, out_features)`.
            scale: Standard deviation of the parameters.
            dtype: Dtype of the parameters.
            **options: Options of `init`.
        """
        draw = np.random.default_rng(0).normal
        start = cls._abstract(shape, options)
        return start.with_arrays(
            **{k: jnp.asarray(draw(scale=scale, size=v.shape), dtype) for k, v in start.arrays().items()}
        )

    @classmethod
    def example(cls) -> Self:
        """Return a small random matrix for pictures, tables and tests, the same in every call."""
        return cls.random((8, 8), **cls.typical_options((8, 8))[0])

    @classmethod
    def _abstract(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> Self:
        return jax.eval_shape(lambda: cls.init(jax.random.key(0), shape, scale=1.0, **options))

    @classmethod
    def _if_within(cls, shape: tuple[int, int], budget: int, options: dict[str, Any]) -> dict[str, Any] | None:
        return options if cls.count(shape, **options) <= budget else None


FAMILIES: dict[str, type[Family]] = {}
"""All families by class name. The decorator `family` adds them."""


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def family(cls: type[F]) -> type[F]:
    """Turn a subclass of `Family` into a frozen dataclass and a pytree, and register it under its class name.

    Use it as a class decorator. Fields declared with `static()` become part of the pytree structure. All other fields
    become array leaves, in the order in which the class declares them.

    If a class with the same name and module is already registered, the new class replaces it. This happens if a cell of
    a notebook runs again.

    Args:
        cls: The class. It becomes `FAMILIES[cls.__name__]`. Configurations and error messages refer to the family by
            this name.

    Raises:
        UserError: Another family has this name, or the class is not a subclass of `Family` or lacks a method that every
            family must define.
    """
    if not issubclass(cls, Family):
        raise UserError(f"{cls.__name__} must be a subclass of surm_jax.structured.Family")
    if missing := sorted(cls.__abstractmethods__):
        raise UserError(f"{cls.__name__} lacks {', '.join(missing)}, which every family must define")
    other = FAMILIES.get(cls.__name__)
    if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(f"there already is a family {cls.__name__} ({other.__module__}): rename this one")
    FAMILIES[cls.__name__] = cls = matrix_pytree(cls)
    return cls


class LinearInVector(Family):
    """Base class of the families in which a matrix has a single array, a vector, in which it is linear.

    A subclass declares two fields: first the vector, then the static field `shape`.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        self._check_leaf(self._leaf_names[0], (self._length(self.shape),))

    @staticmethod
    def _length(shape: tuple[int, int]) -> int:
        """Return the length of the vector for a matrix of this shape, by default N = max(in, out)."""
        return max(shape)

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the zero matrix, with which training starts.

        No array is random. The matrix is linear in its vector, so the gradient of the vector is not zero at the start.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            dtype: Dtype of the vector.

        Raises:
            UserError: The shape is not two positive integers.
        """
        shape = checked_shape(cls.__name__, shape)
        return cls(jnp.zeros(cls._length(shape), dtype), shape=shape)  # type: ignore[call-arg]  # fields of subclasses


class TwoFactors(Family):
    """Base class of the families in which a matrix has two arrays, and rank r takes r (in + out) parameters.

    A subclass declares two array fields. `init` sets the second one to zero.
    """

    @property
    def linear_in(self) -> str:
        """The name of the second array, which `init` sets to zero. `M` is linear in it."""
        return self._leaf_names[1]

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest rank within the budget of parameters, or None if rank 1 is above the budget."""
        rank = largest_size(budget // sum(shape), min(shape))
        return {"rank": rank} if rank else None


def check_rank(owner: str, rank: int, shape: tuple[int, int]) -> None:
    """Check the rank of a matrix, or of a factor of one, against its shape.

    Args:
        owner: What the error message begins with: the name of the calling class.
        rank: The rank.
        shape: The shape of the matrix or the factor.

    Raises:
        UserError: The rank is not an integer from 1 to the smaller side.
    """
    m, n = shape
    if not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise UserError(f"{owner}: a {m} x {n} matrix has a rank from 1 to {min(m, n)}, but {rank!r} was asked for")


def scaled_normal(
    key: PRNGKeyArray, shape: Sequence[int], scale: float | Float[ArrayLike, ""], dtype: DTypeLike
) -> Array:
    """Return random numbers `scale * N(0, 1)` in `dtype`.

    The scale is converted to `dtype` first, because a NumPy scalar would promote half precision to a wider dtype.
    """
    return jnp.asarray(scale, dtype) * jax.random.normal(key, tuple(shape), dtype)


def checked_dense(owner: str, dense: ArrayLike) -> Float[Array, "in out"]:
    """Check the dense matrix that `nearest` approximates, and return it in float32 or float64.

    Args:
        owner: Name of the calling class, with which the error message begins.
        dense: The matrix, (in_features, out_features).

    Raises:
        UserError: `dense` is not a non-empty real floating-point matrix.
    """
    dense = jnp.asarray(dense)
    if dense.ndim != 2 or 0 in dense.shape or not jnp.issubdtype(dense.dtype, jnp.floating):
        raise UserError(
            f"{owner}: nearest() takes a non-empty floating-point matrix (in_features, out_features), "
            f"not {dense.dtype} of shape {dense.shape}"
        )
    return dense.astype(compute_dtype(dense.dtype))


def largest_size(available: int, most: int) -> int | None:
    """Return the largest value of an option such as a rank, for `options_within`, or None if no value is possible.

    Args:
        available: The largest value that the budget of parameters allows. If it is less than 1, no value is possible.
        most: The largest value that the shape allows.
    """
    return min(available, most) if available >= 1 else None
