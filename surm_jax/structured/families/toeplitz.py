"""Toeplitz matrices, which are constant along every diagonal, and symmetric Toeplitz matrices.

The paper (arXiv 2406.17740) writes `W x`. Here `y = x @ M` with `M = W^T`, so the entries above the main diagonal of
`M` are those below the main diagonal of `W`. For a symmetric square matrix the two conventions agree, because it is its
own transpose.

A rectangular `Toeplitz` has one parameter for each of its own diagonals. A rectangular `Circulant` is different: it is
a block of a square circulant matrix, and has the parameters of that square matrix.
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
    """Toeplitz matrix `M[i, j] = t[j - i + in - 1]`, which has one parameter for each diagonal.

    It has in + out - 1 parameters. A Toeplitz matrix is a block of a larger circulant or skew-circulant matrix, whose
    size is at least in + out - 1. The product with x embeds it into a skew-circulant matrix, because this needs cheaper
    FFTs than a circulant matrix, in the forward and in the backward pass. For in = out they are complex FFTs of length
    in, without padding. The product takes O(N log N) operations per row of x, N = max(in, out). `M` is the transpose of
    the `W` of arXiv 2406.17740.

    Attributes:
        t: (in + out - 1,), the first column of `M` from bottom to top, followed by the rest of its first row.
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
        """Return the number of diagonals of a matrix of this shape, which is the length of `t`."""
        return sum(shape) - 1

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return the Toeplitz matrix nearest to `dense` in the Frobenius norm.

        Each entry of `t` is the mean of one diagonal of `dense`. This takes O(in * out) operations.

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
        """The transpose, with the reversed vector `t`."""
        return Toeplitz(t=jnp.flip(self.t), shape=self.shape[::-1])

    def _convolve(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M`. `_apply` calls this method for each device's part of the batch."""
        m, n = self.shape
        size = 2 * fast_length((m + n) // 2)  # an even length of at least m + n - 1
        # The minus sign cancels the one that a skew-circulant matrix gives to entries that wrap around.
        v = jnp.concatenate([self.t[m - 1 :], jnp.zeros(size - (m + n - 1), x.dtype), -self.t[: m - 1]])
        spectrum = jnp.expand_dims(skew_fft(v, size), tuple(range(x.ndim - 1)))
        return inverse_skew_fft(skew_fft(x, size) * spectrum, size)[..., :n]

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_in_turn(x, self)

    def _dense(self) -> Float[Array, "in out"]:
        return from_diagonals(self.t, self.shape)


@family
class SymmetricToeplitz(LinearInVector):
    """Symmetric Toeplitz matrix `M[i, j] = t[|i - j|]`, which has max(in, out) parameters.

    `M` is the transpose of the `W` of arXiv 2406.17740. For in = out both are equal, because `M` is its own transpose.
    A rectangular matrix is the top-left block of a symmetric square matrix of size max(in, out). The product with x
    costs as much as with `Toeplitz`.

    Attributes:
        t: (max(in, out),), where `t[k]` is the entry at distance k from the main diagonal. It is the longer of the
            first row and the first column of `M`.
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
        """Return the symmetric Toeplitz matrix nearest to `dense` in the Frobenius norm.

        `t[k]` is the mean of all entries of `dense` at distance k from the main diagonal, above and below it. The
        formula in arXiv 2406.17740 uses only one side, which gives the nearest matrix only if `dense` is symmetric. The
        mean takes O(in * out) operations.

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        t = _project(lambda t: from_diagonals(_mirror(t, (m, n)), (m, n)), max(m, n), dense)
        return cls(t=t, shape=(m, n))

    @property
    def T(self) -> "SymmetricToeplitz":
        """The transpose: the same vector `t`, with the two sizes of the shape exchanged."""
        return SymmetricToeplitz(t=self.t, shape=self.shape[::-1])

    def general(self) -> Toeplitz:
        """Return an equal `Toeplitz` matrix, which stores both sides of the main diagonal."""
        return Toeplitz(t=_mirror(self.t, self.shape), shape=self.shape)

    def _convolve(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x @ M`. `_apply` calls this method for each device's part of the batch."""
        return self.general()._convolve(x)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return apply_in_turn(x, self)

    def _dense(self) -> Float[Array, "in out"]:
        return self.general()._dense()


@batch_local
def apply_in_turn(x: Float[Array, "*batch in"], *matrices: Toeplitz | SymmetricToeplitz) -> Float[Array, "*batch out"]:
    """Return `x @ M1 @ M2 ...` for the given matrices. Each device computes its part of the batch.

    `x` and all matrices have the same dtype, float32 or float64.
    """
    for matrix in matrices:
        x = matrix._convolve(x)
    return x


def _mirror(t: Float[Array, " N"], shape: tuple[int, int]) -> Float[Array, " diagonals"]:
    """Convert the vector `t` of a `SymmetricToeplitz` to the vector `t` of the equal `Toeplitz`."""
    m, n = shape
    return jnp.concatenate([jnp.flip(t[1:m]), t[:n]])


def _project(
    build: Callable[[Float[Array, " k"]], Float[Array, "in out"]], count: int, dense: Float[Array, "in out"]
) -> Float[Array, " k"]:
    """Return the vector t of length `count` for which `build(t)` is nearest to `dense` in the Frobenius norm.

    Each entry of `build(t)` is one entry of t. So the best `t[k]` is the mean of `dense` where `build` places `t[k]`.
    The adjoint of `build` computes the sums of these entries, and from a matrix of ones their number.
    """
    adjoint = jax.linear_transpose(build, jax.ShapeDtypeStruct((count,), dense.dtype))
    return adjoint(dense)[0] / adjoint(jnp.ones_like(dense))[0]
