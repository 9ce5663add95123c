"""Products of two Toeplitz matrices, the paper's Toeplitz update.

The paper (arXiv 2406.17740) writes `W x` with `W = T2 T1`: x is multiplied by `T1` first. Here `y = x @ M` with
`M = W^T = T1^T T2^T`, and `t1` and `t2` hold the numbers of `T1^T` and `T2^T`. Transposing exchanges the factors, so
the transpose of a pair is a pair of the same family.

Rectangular shapes: the size between the factors is `N = max(in, out)`. So `M` is the top left block of a product of
square matrices of size N, as in the circulant families.
"""

import abc
from typing import ClassVar, Self

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.structured.base import TIMES, Piece, checked_shape, matrix_pytree, static
from surm_jax.structured.families.base import Family, checked_dense, family, scaled_normal
from surm_jax.structured.families.toeplitz import SymmetricToeplitz, Toeplitz, apply_in_turn
from surm_jax.structured.fit import refine

Factor = Toeplitz | SymmetricToeplitz
"""One of the two factors of a pair."""


@matrix_pytree
class _Pair(Family):
    """Base class of both families, which differ in the class of their factors."""

    t1: Float[Array, " count1"]
    t2: Float[Array, " count2"]
    shape: tuple[int, int] = static()

    searches = True
    _factor: ClassVar[type[Factor]]

    @staticmethod
    @abc.abstractmethod
    def _counts(shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many numbers `t1` and `t2` hold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        for name, count in zip(("t1", "t2"), self._counts(self.shape), strict=True):
            self._check_leaf(name, (count,))

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the zero matrix: `t1 = 0` and `t2 = scale * N(0, 1)`. If both were zero, neither would ever learn.

        Args:
            key: Draws `t2`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `t2`.
            dtype: Type of both factors.

        Raises:
            UserError: The shape is not two positive integers.
        """
        shape = checked_shape(cls.__name__, shape)
        count1, count2 = cls._counts(shape)
        return cls(t1=jnp.zeros(count1, dtype), t2=scaled_normal(key, (count2,), scale, dtype), shape=shape)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, steps: int = 200, progress: bool = False) -> Self:
        """Return a pair near to `dense` in the Frobenius norm, never further from it than the nearest single factor.

        There is no formula for the nearest product. The search starts at the nearest single Toeplitz matrix (symmetric
        if the factors are symmetric) times the identity, and `refine` finds a local minimum. At the start both factors
        get the same Frobenius norm; with an unscaled identity, of norm sqrt(N), the search stops earlier, at a larger
        error. Neither factor is zero, so that a pair near zero can still learn.

        Args:
            dense: (in_features, out_features).
            steps: Largest number of steps of `refine`.
            progress: Whether to show a bar.

        Raises:
            UserError: `dense` is not a floating-point matrix or holds numbers that are not finite, or the number of
                steps is not possible.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        single, identity = cls._factor.nearest(dense), cls._factor.nearest(jnp.eye(m, max(m, n), dtype=dense.dtype))
        norm = jnp.linalg.norm(single.to_dense()) / m**0.5
        balance = jnp.sqrt(jnp.where(norm > 0, norm, 1))
        # A second factor that is taller than `dense` has diagonals in the bottom left corner that the product with
        # the identity does not use.
        unreached = cls._counts((m, n))[1] - single.t.shape[0]
        t2 = jnp.pad(single.t / balance, (unreached, 0))
        return refine(cls(t1=identity.t * balance, t2=t2, shape=(m, n)), dense, steps=steps, progress=progress)

    def pieces(self) -> list[Piece | str]:
        """Return both factors."""
        first, second = (
            Piece(f"T_{i}^\\top", {"t": (f"t{i}", ...)}, factor) for i, factor in enumerate(self.factors, 1)
        )
        return [first, TIMES, second]

    @property
    def T(self) -> Self:
        """The transpose: the factors are transposed and change places."""
        first, second = self.factors
        return type(self)(t1=second.T.t, t2=first.T.t, shape=self.shape[::-1])

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """The matrices whose product is `M`, of shapes (in_features, N) and (N, out_features), N = max(in, out)."""
        m, n = self.shape
        return self._factor(self.t1, shape=(m, max(m, n))), self._factor(self.t2, shape=(max(m, n), n))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_in_turn(x, *self.factors)

    def _dense(self) -> Float[Array, "in out"]:
        first, second = self.factors
        return second._convolve(first._dense())


@family
class ToeplitzPair(_Pair):
    """Product of two Toeplitz matrices, `M = T1^T T2^T`; the transpose of `W = T2 T1` of arXiv 2406.17740.

    It has (in + N - 1) + (N + out - 1) numbers, N = max(in, out): 4 in - 2 for in = out. In general the product is not
    a Toeplitz matrix; its displacement rank is at most 4. A row costs the four transforms of two products with
    `Toeplitz`, because the intermediate result has to be cut to size. The dense form takes O(N^2 log N), less than a
    matrix product.

    Attributes:
        t1: (in + N - 1,), the numbers of `T1^T`, (in, N), in the order of `Toeplitz`; zero at the start.
        t2: (N + out - 1,), the numbers of `T2^T`, (N, out), in the same order; random at the start.
        shape: `(in_features, out_features)`.

    >>> ToeplitzPair(t1=jnp.array([0.0, 1.0, 1.0]), t2=jnp.array([2.0, 1.0, 0.0]), shape=(2, 2)).to_dense().round()
    Array([[3., 1.],
           [2., 1.]], dtype=float32)
    """

    _title = "Toeplitz pair"
    _factor = Toeplitz

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((5, 5))

    @staticmethod
    def _counts(shape: tuple[int, int]) -> tuple[int, int]:
        return shape[0] + max(shape) - 1, max(shape) + shape[1] - 1


@family
class SymmetricToeplitzPair(_Pair):
    """Product of two symmetric Toeplitz matrices, `M = T1 T2`; the transpose of `W = T2 T1` of arXiv 2406.17740.

    It has 2N numbers, N = max(in, out), and is the update that the paper calls Toeplitz. In general the product is
    neither symmetric nor a Toeplitz matrix. For in = out, `M^T` is the pair with its factors exchanged. It costs as
    much as `ToeplitzPair`.

    Attributes:
        t1: (N,), the numbers of `T1^T`, in the order of `SymmetricToeplitz`; zero at the start.
        t2: (N,), the numbers of `T2^T`, in the same order; random at the start.
        shape: `(in_features, out_features)`.

    >>> SymmetricToeplitzPair(t1=jnp.array([0.0, 1.0]), t2=jnp.array([2.0, 1.0]), shape=(2, 2)).to_dense().round()
    Array([[1., 2.],
           [2., 1.]], dtype=float32)
    """

    _title = "sym. Toeplitz pair"
    _factor = SymmetricToeplitz

    @staticmethod
    def _counts(shape: tuple[int, int]) -> tuple[int, int]:
        return max(shape), max(shape)
