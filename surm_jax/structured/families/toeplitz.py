"""Toeplitz matrices, constant along every diagonal, and symmetric ones, equal on both sides of the main diagonal.

The paper (arXiv 2406.17740) writes `W x`. Here `y = x @ M` with `M = W^T`: entries above the diagonal of `M` are below
the diagonal of `W`. Symmetric square matrices are their own transposes.

Rectangular shapes are Toeplitz matrices themselves; nothing is padded.
"""

from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.devices.batch import batch_local
from surm_jax.structured.base import static
from surm_jax.structured.families.base import LinearInVector, checked_dense, family
from surm_jax.structured.products.diagonals import from_diagonals
from surm_jax.structured.products.fourier import fast_length, inverse_skew_fft, skew_fft


@family
class Toeplitz(LinearInVector):
    """Toeplitz matrix `M[i, j] = t[j - i + in - 1]`: `t` read along the diagonals; the transpose of the paper's `W`.

    It has in + out - 1 numbers. A Toeplitz matrix is a block of a circulant or skew-circulant matrix of any size that
    is at least in + out - 1. The skew-circulant has the cheaper transforms, forward and in reverse mode: for in = out
    they are complex FFTs of length in, without padding. A row costs O(N log N), N = max(in, out).

    Attributes:
        t: (in + out - 1,): the first column of `M` from bottom to top, then the rest of its first row.
        shape: `(in_features, out_features)`.

    >>> Toeplitz(jnp.array([1.0, 2.0, 3.0, 4.0]), shape=(2, 3)).to_dense()
    Array([[2., 3., 4.],
           [1., 2., 3.]], dtype=float32)
    """

    _title = "Toeplitz"

    t: Float[Array, " diagonals"]
    shape: tuple[int, int] = static()

    @staticmethod
    def _length(shape: tuple[int, int]) -> int:
        """Return how many diagonals a matrix of this shape has."""
        return sum(shape) - 1

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return the Toeplitz matrix nearest to `dense` in the Frobenius norm: the mean of every diagonal. O(in * out).

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        return cls(t=_project(lambda t: from_diagonals(t, (m, n)), m + n - 1, dense), shape=(m, n))

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((6, 8))

    @property
    def T(self) -> "Toeplitz":
        """The transpose: `t` read backwards."""
        return Toeplitz(t=jnp.flip(self.t), shape=self.shape[::-1])

    def _convolve(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M` on one device, for `_apply`."""
        m, n = self.shape
        size = 2 * fast_length((m + n) // 2)  # an even length of at least m + n - 1
        # Entries that wrap around change their sign in a skew-circulant matrix: hence the minus.
        v = jnp.concatenate([self.t[m - 1 :], jnp.zeros(size - (m + n - 1), x.dtype), -self.t[: m - 1]])
        spectrum = jnp.expand_dims(skew_fft(v, size), tuple(range(x.ndim - 1)))
        return inverse_skew_fft(skew_fft(x, size) * spectrum, size)[..., :n]

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_in_turn(x, self)

    def _dense(self) -> Float[Array, "in out"]:
        return from_diagonals(self.t, self.shape)


@family
class SymmetricToeplitz(LinearInVector):
    """Symmetric Toeplitz matrix `M[i, j] = t[|i - j|]`: max(in, out) numbers; the transpose of the paper's `W`.

    For in = out it is its own transpose. A rectangular matrix is the top left block of the square matrix of size
    max(in, out). Products cost as much as those of `Toeplitz`.

    Attributes:
        t: (max(in, out),), by distance from the main diagonal: the longer of the first row and the first column.
        shape: `(in_features, out_features)`.

    >>> SymmetricToeplitz(jnp.array([1.0, 2.0, 3.0]), shape=(2, 3)).to_dense()
    Array([[1., 2., 3.],
           [2., 1., 2.]], dtype=float32)
    """

    _title = "symmetric Toeplitz"

    t: Float[Array, " N"]
    shape: tuple[int, int] = static()

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return the symmetric Toeplitz matrix nearest to `dense` in the Frobenius norm. O(in * out).

        `t[k]` is the mean over all entries at distance k from the main diagonal, above and below it. The formula in
        arXiv 2406.17740 takes only one side, which gives the nearest matrix only if `dense` is symmetric.

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        t = _project(lambda t: from_diagonals(_mirror(t, (m, n)), (m, n)), max(m, n), dense)
        return cls(t=t, shape=(m, n))

    @property
    def T(self) -> "SymmetricToeplitz":
        """The transpose: the same numbers, with the sizes exchanged."""
        return SymmetricToeplitz(t=self.t, shape=self.shape[::-1])

    def general(self) -> Toeplitz:
        """Return the same matrix as a `Toeplitz`, with every diagonal written out."""
        return Toeplitz(t=_mirror(self.t, self.shape), shape=self.shape)

    def _convolve(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M` on one device, for `_apply`."""
        return self.general()._convolve(x)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_in_turn(x, self)

    def _dense(self) -> Float[Array, "in out"]:
        return self.general()._dense()


@batch_local
def apply_in_turn(x: Float[Array, "*batch in"], *matrices: Toeplitz | SymmetricToeplitz) -> Float[Array, "*batch out"]:
    """Return `x @ M1 @ M2 ...`, all in one dtype, float32 or float64; each device works on its part of the batch."""
    for matrix in matrices:
        x = matrix._convolve(x)
    return x


def _mirror(t: Float[Array, " N"], shape: tuple[int, int]) -> Float[Array, " diagonals"]:
    """Return the numbers of all diagonals, as in `Toeplitz.t`, from the numbers by distance."""
    m, n = shape
    return jnp.concatenate([jnp.flip(t[1:m]), t[:n]])


def _project(
    build: Callable[[Float[Array, " k"]], Float[Array, "in out"]], count: int, dense: Float[Array, "in out"]
) -> Float[Array, " k"]:
    """Return, for each of `count` numbers, the mean of `dense` over the entries where `build` puts the number.

    Each entry of the matrix is one of the numbers, so the matrices that `build` makes of unit vectors are orthogonal,
    and the projection needs only the adjoint of `build`: sums over entries, divided by their counts.
    """
    adjoint = jax.linear_transpose(build, jax.ShapeDtypeStruct((count,), dense.dtype))
    return adjoint(dense)[0] / adjoint(jnp.ones_like(dense))[0]
