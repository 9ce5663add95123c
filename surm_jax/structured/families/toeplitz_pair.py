"""Products of two Toeplitz matrices, which arXiv 2406.17740 adds to kernels.

The paper writes `W x` with `W = T2 T1`, so x is multiplied by `T1` first. Here `y = x @ M` with `M = W^T = T1^T T2^T`,
and the vectors `t1` and `t2` hold the parameters of `T1^T` and `T2^T`. The transpose of a pair is a pair of the same
family, in which the factors are transposed and exchanged.

For a rectangular matrix, the factors have the shapes (in, N) and (N, out) with `N = max(in, out)`. So `M` is the
top-left block of a product of two square matrices of size N.
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
"""The classes of the two factors of a pair."""


@matrix_pytree
class _Pair(Family):
    """Base class of the two families in this file, with general and with symmetric factors."""

    t1: Float[Array, " count1"]
    t2: Float[Array, " count2"]
    shape: tuple[int, int] = static()

    searches = True
    _factor: ClassVar[type[Factor]]

    @staticmethod
    @abc.abstractmethod
    def _counts(shape: tuple[int, int]) -> tuple[int, int]:
        """Return the lengths of `t1` and `t2` for a matrix of this shape."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        for name, count in zip(("t1", "t2"), self._counts(self.shape), strict=True):
            self._check_leaf(name, (count,))

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the matrix with which training starts: it is zero, with `t1 = 0` and `t2 = scale * N(0, 1)`.

        If both vectors were zero, both gradients would be zero too, and training could not change them.

        Args:
            key: Random key for `t2`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `t2`.
            dtype: Dtype of both vectors.

        Raises:
            UserError: The shape is not two positive integers.
        """
        shape = checked_shape(cls.__name__, shape)
        count1, count2 = cls._counts(shape)
        return cls(t1=jnp.zeros(count1, dtype), t2=scaled_normal(key, (count2,), scale, dtype), shape=shape)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, steps: int = 200, progress: bool = False) -> Self:
        """Return a product of two factors near to `dense` in the Frobenius norm, found by a search.

        The nearest product has no closed form. The search `surm_jax.structured.refine` starts at the product of the
        identity and the nearest single Toeplitz matrix (symmetric if the factors are symmetric), and finds a local
        minimum. So the result is never further from `dense` than the nearest single Toeplitz matrix. Both factors are
        scaled to the same Frobenius norm before the search. With an unscaled identity, whose norm is sqrt(in), the
        search stops earlier, at a larger error. The factor that is the scaled identity is not zero even if `dense` is,
        so the gradient of the other factor is not zero.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            steps: Largest number of steps of the search.
            progress: Whether to show a progress bar.

        Raises:
            UserError: `dense` is not a floating-point matrix or holds numbers that are not finite, or the number of
                steps is not possible.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        single, identity = cls._factor.nearest(dense), cls._factor.nearest(jnp.eye(m, max(m, n), dtype=dense.dtype))
        norm = jnp.linalg.norm(single.to_dense()) / m**0.5
        balance = jnp.sqrt(jnp.where(norm > 0, norm, 1))
        # If the second factor has more rows than `dense`, the product with the identity does not use the diagonals in
        # its bottom-left corner.
        unreached = cls._counts((m, n))[1] - single.t.shape[0]
        t2 = jnp.pad(single.t / balance, (unreached, 0))
        return refine(cls(t1=identity.t * balance, t2=t2, shape=(m, n)), dense, steps=steps, progress=progress)

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: both factors, with a multiplication sign between them."""
        first, second = (
            Piece(f"T_{i}^\\top", {"t": (f"t{i}", ...)}, factor) for i, factor in enumerate(self.factors, 1)
        )
        return [first, TIMES, second]

    @property
    def T(self) -> Self:
        """The transpose, in which the factors are transposed and exchanged."""
        first, second = self.factors
        return type(self)(t1=second.T.t, t2=first.T.t, shape=self.shape[::-1])

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """The two matrices whose product is `M`. Their shapes are (in, N) and (N, out), N = max(in, out)."""
        m, n = self.shape
        return self._factor(self.t1, shape=(m, max(m, n))), self._factor(self.t2, shape=(max(m, n), n))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_in_turn(x, *self.factors)

    def _dense(self) -> Float[Array, "in out"]:
        first, second = self.factors
        return second._convolve(first._dense())


@family
class ToeplitzPair(_Pair):
    """Product of two Toeplitz matrices, `M = T1^T T2^T`. It is the transpose of `W = T2 T1` of arXiv 2406.17740.

    It has (in + N - 1) + (N + out - 1) parameters, N = max(in, out). For in = out these are 4 in - 2. In general the
    product is not a Toeplitz matrix, but its displacement rank is at most 4. A row of x takes four FFTs, two for each
    factor as in `Toeplitz`. The FFTs of both factors cannot be merged, because the intermediate result is truncated to
    N entries. The dense form takes O(N^2 log N) operations, fewer than a matrix product.

    Attributes:
        t1: (in + N - 1,), the vector `t` of the `Toeplitz` matrix `T1^T`, (in, N). It is zero when training starts.
        t2: (N + out - 1,), the vector `t` of the `Toeplitz` matrix `T2^T`, (N, out). It is random when training starts.
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
    """Product of two symmetric Toeplitz matrices, `M = T1 T2`. It is the transpose of `W = T2 T1` of arXiv 2406.17740.

    It has 2N parameters, N = max(in, out). The paper calls it the Toeplitz method. In general the product is neither
    symmetric nor a Toeplitz matrix. For in = out, `M^T` is the pair in which t1 and t2 are exchanged. The product with
    x costs as much as with `ToeplitzPair`.

    Attributes:
        t1: (N,), the vector `t` of the first `SymmetricToeplitz` factor, (in, N). It is zero when training starts.
        t2: (N,), the vector `t` of the second `SymmetricToeplitz` factor, (N, out). It is random when training starts.
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
