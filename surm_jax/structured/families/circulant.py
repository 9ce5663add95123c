"""Circulant matrices, and Hadamard products of two circulant matrices.

In the paper (arXiv 2406.17740), the Hadamard products have the best results.

The paper writes `W x` with the circulant matrix `W = Z_1(c)`, `W[i, j] = c[(i - j) mod N]`. Here `y = x @ M` with
`M = W^T`, so `M[i, j] = c[(j - i) mod N]`. The first ROW of `M` is `c`, and `y` is the circular convolution of `x` and
`c`.

A rectangular m x n matrix is the top-left m x n block of a square circulant matrix of size `N = max(m, n)`, and has N
parameters. Inputs are padded with zeros, and outputs are truncated.
"""

from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.structured.base import Piece, checked_shape, compute_dtype, static
from surm_jax.structured.families.base import Family, LinearInVector, checked_dense, family, scaled_normal
from surm_jax.structured.products.diagonals import from_wrapped_diagonals, wrapped_spectrum
from surm_jax.structured.products.fourier import circular_convolve


@family
class Circulant(LinearInVector):
    """Circulant matrix `M[i, j] = c[(j - i) mod N]`, N = max(in, out): the transpose of `Z_1(c)` of arXiv 2406.17740.

    If in = out, `x @ M = irfft(rfft(x) * rfft(c))`. The matrix has N parameters, and the product takes O(N log N)
    operations per row of x. A dense square matrix has N^2 parameters and takes N^2 multiplications per row. Products,
    sums and Hadamard products of square circulant matrices are circulant.

    Attributes:
        c: (N,), the first row of `M`, which is the first column of the paper's `W`.
        shape: `(in_features, out_features)`.

    >>> Circulant(jnp.array([1.0, 2.0, 3.0]), shape=(3, 3)).to_dense()
    Array([[1., 2., 3.],
           [3., 1., 2.],
           [2., 3., 1.]], dtype=float32)
    """

    c: Float[Array, " N"]
    shape: tuple[int, int] = static()

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return the circulant matrix nearest to `dense` in the Frobenius norm.

        `c[k]` is the mean of the entries (i, j) of `dense` with j - i = k mod N. These entries form a wrapped diagonal,
        with min(m, n) entries in an m x n matrix. The N wrapped diagonals are disjoint, so their indicator matrices are
        orthogonal, and the projection onto them is a mean. It takes O(m n) operations.

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        if m > n:
            return cls(c=_reverse(cls.nearest(dense.T).c), shape=(m, n))
        # If row i is rolled to the left by i places, every wrapped diagonal becomes a column.
        rows = jnp.arange(m)[:, None]
        return cls(c=dense[rows, (rows + jnp.arange(n)[None, :]) % n].mean(axis=0), shape=(m, n))

    def spectrum(self) -> Complex[np.ndarray, " n"] | None:
        """Return the eigenvalues of a square matrix, an FFT of the vector, and None for a rectangular one."""
        return wrapped_spectrum(self.c, self.shape)

    @property
    def T(self) -> "Circulant":
        """The transpose: the circulant matrix of the reversed vector `c[-k mod N]`."""
        return Circulant(c=_reverse(self.c), shape=self.shape[::-1])

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return circular_convolve(x, self.c)[..., : self.shape[1]]

    def _dense(self) -> Float[Array, "in out"]:
        return from_wrapped_diagonals(self.c, self.shape)

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return self.c[-jnp.subtract.outer(ids, jnp.arange(self.shape[1])) % self.c.size]


@family
class CirculantPair(Family):
    """Hadamard product of two circulant matrices, `C(r1) o C(r2) = C(r1 * r2)`, of arXiv 2406.17740.

    Here `C(r)` is the circulant matrix with the first row r, and `o` is the elementwise product. The result is itself a
    circulant matrix, so this family contains the same matrices as `Circulant`, and the product with x costs as much. A
    matrix has 2N parameters in training, while `compact` returns an equal `Circulant` with N parameters. Training
    differs from that of a `Circulant`, because gradient descent on the two vectors takes another path than gradient
    descent on their product. When training starts, r1 is zero and r2 is random.

    Attributes:
        r1: (N,), N = max(in, out), the first row of the first circulant matrix. It is zero when training starts.
        r2: (N,), the first row of the second circulant matrix. It is random when training starts.
        shape: `(in_features, out_features)`. Rectangular matrices are blocks of square ones, as in `Circulant`.

    >>> CirculantPair(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), shape=(2, 2)).to_dense()
    Array([[3., 8.],
           [8., 3.]], dtype=float32)
    """

    r1: Float[Array, " N"]
    r2: Float[Array, " N"]
    shape: tuple[int, int] = static()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        self._check_leaf("r1", (max(self.shape),))
        self._check_leaf("r2", (max(self.shape),))

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the matrix with which training starts: it is zero, with `r1 = 0` and `r2 = scale * N(0, 1)`.

        If both vectors were zero, both gradients would be zero too, and training could not change them.

        Args:
            key: Random key for `r2`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `r2`.
            dtype: Dtype of both vectors.

        Raises:
            UserError: The shape is not two positive integers.
        """
        shape = checked_shape(cls.__name__, shape)
        r2 = scaled_normal(key, (max(shape),), scale, dtype)
        return cls(r1=jnp.zeros_like(r2), r2=r2, shape=shape)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"]) -> Self:
        """Return the circulant matrix nearest to `dense` (`Circulant.nearest`), with `r1 = c` and ones in r2.

        So `r1 * r2` is exactly the vector c of the nearest `Circulant`. No index has a zero in both vectors. Otherwise
        the gradients of both entries would be zero too, and training could not change them.

        Raises:
            UserError: `dense` is not a floating-point matrix.
        """
        circulant = Circulant.nearest(checked_dense(cls.__name__, dense))
        return cls(r1=circulant.c, r2=jnp.ones_like(circulant.c), shape=circulant.shape)

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((6, 6))

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: both circulant matrices, with the symbol of the Hadamard product between them."""
        first, second = (
            Piece(f"Z_1(r_{i})^\\top", {"c": (f"r{i}", ...)}, Circulant(leaf, shape=self.shape))
            for i, leaf in enumerate((self.r1, self.r2), 1)
        )
        return [first, "\\circ", second]

    @property
    def T(self) -> "CirculantPair":
        """The transpose. Entry k of each of its vectors is entry `-k mod N` of this matrix's vector."""
        return CirculantPair(r1=_reverse(self.r1), r2=_reverse(self.r2), shape=self.shape[::-1])

    def compact(self) -> Circulant:
        """Return the circulant matrix of `r1 * r2` in float32 or float64, which has N parameters instead of 2N."""
        dtype = compute_dtype(self.r1.dtype, self.r2.dtype)
        return Circulant(c=self.r1.astype(dtype) * self.r2.astype(dtype), shape=self.shape)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.compact()._apply(x)

    def _dense(self) -> Float[Array, "in out"]:
        return self.compact()._dense()

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        return self.compact()._rows(ids)


def _reverse(c: Float[Array, " N"]) -> Float[Array, " N"]:
    """Return the vector `c[-k mod N]`, in which the first entry stays and the others are reversed."""
    return jnp.roll(jnp.flip(c), 1)
