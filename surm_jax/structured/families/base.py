"""Base class of the families of matrices, and the registry of all families.

To add a family, write one file with a subclass of `Family` under the decorator `family`. The file may be anywhere:
importing it registers the class under its name. The class names its array leaves as the paper does. It implements `T`,
`_apply` and `_dense`, as every matrix does, and `init` and `nearest`, as every family does. If `init` and `nearest`
take options, such as a rank, the class also says which ones and how large they may be (`option_names`,
`options_within`, `typical_options`). All other code learns about a family from these members.
"""

import abc
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix, checked_shape, compute_dtype, matrix_pytree, static

F = TypeVar("F", bound="Family")
"""Any subclass of `Family`."""


class Family(StructuredMatrix):
    """Base class of the families: matrices with a start for training and a projection of dense matrices.

    Attributes:
        option_names: The options of `init` and `nearest`. A matrix has attributes of these names.
        searches: Whether `nearest` is a search. If so, it takes `steps` and `progress`, like `refine`.
    """

    option_names: ClassVar[tuple[str, ...]] = ()
    searches: ClassVar[bool] = False
    _title: ClassVar[str] = ""

    @classmethod
    @abc.abstractmethod
    def init(cls, *args: Any, **options: Any) -> Self:
        """Return a zero matrix that can learn: if it has several factors, one is zero and the others are random.

        The arguments are `init(key, shape, *, scale, dtype=float32, **options)`:

        - key: Source of the random factors.
        - shape: `(in_features, out_features)`.
        - scale: Standard deviation of the random factors. The speed of the first steps is proportional to its square.
        - dtype: Type of the parameters.
        - options: Options of the family, such as a rank.

        Raises:
            UserError: The shape or an option is not possible.
        """

    @classmethod
    @abc.abstractmethod
    def nearest(cls, *args: Any, **options: Any) -> Self:
        """Return the member of the family nearest to a dense matrix in the Frobenius norm.

        The arguments are `nearest(dense, **options)`, and `steps` and `progress` if the family `searches`:

        - dense: The target, (in_features, out_features). The result is in at least float32.
        - options: As in `init`.

        Raises:
            UserError: The target is not a floating-point matrix, or an option is not possible.
        """

    @property
    def title(self) -> str:
        """The family's name in tables and pictures, in plain words."""
        return self._title or re.sub("(?<=[a-z])(?=[A-Z])", " ", type(self).__name__).lower()

    def options(self) -> dict[str, Any]:
        """Return the options with which `init` and `nearest` return a matrix of the same sizes."""
        return {name: getattr(self, name) for name in self.option_names}

    @classmethod
    def options_from(cls, shape: tuple[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options for a matrix of this shape, chosen from settings that all families share.

        Args:
            shape: `(in_features, out_features)`.
            settings: Values by name, such as `rank`. Names that the family does not know are ignored.
        """
        del shape
        return {name: settings[name] for name in cls.option_names if name in settings}

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the options of the largest member with at most `budget` parameters, or None if there is none.

        Args:
            shape: `(in_features, out_features)`.
            budget: Largest number of parameters.
        """
        return cls._if_within(shape, budget, {})

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options that benchmarks time for a matrix of this shape, the most common choice first."""
        del shape
        return ({},)

    @classmethod
    def count(cls, shape: tuple[int, int], **options: Any) -> int:
        """Return the number of parameters of a matrix with this shape and these options, without allocating it.

        Raises:
            UserError: The shape or an option is not possible.
        """
        return cls._abstract(shape, options).num_params

    @classmethod
    def random(
        cls, shape: tuple[int, int], *, scale: float = 1.0, dtype: DTypeLike = jnp.float32, **options: Any
    ) -> Self:
        """Return a member with random parameters, `scale * N(0, 1)`. Every call returns the same numbers.

        Args:
            shape: `(in_features, out_features)`.
            scale: Standard deviation of the parameters.
            dtype: Type of the parameters.
            **options: Options of `init`.
        """
        draw = np.random.default_rng(0).normal
        start = cls._abstract(shape, options)
        return start.with_arrays(
            **{k: jnp.asarray(draw(scale=scale, size=v.shape), dtype) for k, v in start.arrays().items()}
        )

    @classmethod
    def example(cls) -> Self:
        """Return a small random member for pictures, tables and tests. Every call returns the same one."""
        return cls.random((8, 8), **cls.typical_options((8, 8))[0])

    @classmethod
    def _abstract(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> Self:
        return jax.eval_shape(lambda: cls.init(jax.random.key(0), shape, scale=1.0, **options))

    @classmethod
    def _if_within(cls, shape: tuple[int, int], budget: int, options: dict[str, Any]) -> dict[str, Any] | None:
        return options if cls.count(shape, **options) <= budget else None


FAMILIES: dict[str, type[Family]] = {}
"""Every family by its class name."""


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def family(cls: type[F]) -> type[F]:
    """Make a subclass of `Family` a frozen dataclass and a pytree, and register it under its class name.

    Fields declared with `static()` become structure. All other fields become array leaves, in the order of declaration.

    Args:
        cls: The class. It becomes `FAMILIES[cls.__name__]`; configurations and messages use this name.

    Raises:
        UserError: The name is taken by another class, or the class is not a family or lacks one of its methods.
    """
    if not issubclass(cls, Family):
        raise UserError(f"{cls.__name__} must be a subclass of surm_jax.structured.Family")
    if missing := sorted(cls.__abstractmethods__):
        raise UserError(f"{cls.__name__} lacks {', '.join(missing)}, which every family must define")
    if cls.__name__ in FAMILIES:
        raise UserError(
            f"there already is a family {cls.__name__} ({FAMILIES[cls.__name__].__module__}): rename this one"
        )
    FAMILIES[cls.__name__] = cls = matrix_pytree(cls)
    return cls


class LinearInVector(Family):
    """Base class of the families that are linear in one vector. A subclass declares the vector, then `shape`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        self._check_leaf(self._leaf_names[0], (self._length(self.shape),))

    @staticmethod
    def _length(shape: tuple[int, int]) -> int:
        """Return how many numbers a matrix of this shape needs: N = max(in, out)."""
        return max(shape)

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the zero matrix. It is linear in its vector, which can learn from zero: nothing is random.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            dtype: Type of the vector.

        Raises:
            UserError: The shape is not two positive integers.
        """
        shape = checked_shape(cls.__name__, shape)
        return cls(jnp.zeros(cls._length(shape), dtype), shape=shape)  # type: ignore[call-arg]  # fields of subclasses


def scaled_normal(
    key: PRNGKeyArray, shape: Sequence[int], scale: float | Float[ArrayLike, ""], dtype: DTypeLike
) -> Array:
    """Return `scale * N(0, 1)` in `dtype`. A scale that is a NumPy number does not widen half precision."""
    return jnp.asarray(scale, dtype) * jax.random.normal(key, tuple(shape), dtype)


def checked_dense(owner: str, dense: ArrayLike) -> Float[Array, "in out"]:
    """Return the target of a projection as a floating-point matrix of at least float32.

    Args:
        owner: Name of the caller, for the start of the message.
        dense: The matrix to approximate, (in_features, out_features).

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
    """Return `min(available, most)`, or None if `available` is below 1. `options_within` uses it to choose a size."""
    return min(available, most) if available >= 1 else None
