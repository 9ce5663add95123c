"""Khatri-Rao products, which KRAdapter (arXiv 2508.00230) adds to kernels."""

import math
from typing import Self

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.structured.base import Piece, checked_shape, static
from surm_jax.structured.families.base import Family, checked_dense, family, scaled_normal
from surm_jax.structured.fit import refine


@family
class KhatriRao(Family):
    """Row-wise Khatri-Rao product: row i of `M` is the Kronecker product of row i of `V` and row i of `U`.

    If in <= out, `M[i, b A + a] = V[i, b] U[i, a]`, where A is the number of columns of U, and B that of V. As in
    KRAdapter, A = floor(sqrt(in)) and B = ceil(out / A). Columns of the product beyond the last column of `M` are cut
    off. If in > out, `M` is the transpose of such a matrix, of shape (out, in).

    A 768 x 768 matrix has 768 (27 + 29) = 43,008 parameters, and its rank is usually full. It saves parameters but no
    multiplications: x @ M is computed with the dense matrix, because any other order of the product takes more memory.

    Attributes:
        U: (min(in, out), A). It is zero when training starts.
        V: (min(in, out), B). It is random when training starts.
        shape: `(in_features, out_features)`.
        transposed: Whether the columns and not the rows of `M` are Kronecker products. The default is in > out.

    >>> U, V = jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 10.0, 100.0], [3.0, 4.0, 5.0]])
    >>> KhatriRao(U, V, shape=(2, 3)).to_dense()
    Array([[  1.,  10., 100.],
           [  6.,   8.,  10.]], dtype=float32)
    """

    searches = True
    _title = "Khatri-Rao"

    U: Float[Array, "k A"]
    V: Float[Array, "k B"]
    shape: tuple[int, int] = static()
    transposed: bool | None = static(default=None)

    def __post_init__(self) -> None:
        m, n = checked_shape("KhatriRao", self.shape)
        object.__setattr__(self, "shape", (m, n))
        object.__setattr__(self, "transposed", m > n if m != n or self.transposed is None else self.transposed)
        width_U, width_V = _widths(self.shape)
        self._check_leaf("U", (min(m, n), width_U))
        self._check_leaf("V", (min(m, n), width_V))

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the matrix with which training starts: it is zero, with `U = 0` and `V = scale * N(0, 1)`.

        Args:
            key: Random key for `V`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `V`.
            dtype: Dtype of both arrays.

        Raises:
            UserError: The shape is not two positive integers.
        """
        m, n = checked_shape(cls.__name__, shape)
        width_U, width_V = _widths((m, n))
        V = scaled_normal(key, (min(m, n), width_V), scale, dtype)
        return cls(U=jnp.zeros((min(m, n), width_U), dtype), V=V, shape=(m, n))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, steps: int = 200, progress: bool = False) -> Self:
        """Return a Khatri-Rao product near to `dense` in the Frobenius norm.

        Each row of `dense` is filled up with zeros and reshaped to B x A, and the leading singular vectors of this
        matrix give the row of V and the row of U. If A B is the longer side of `dense`, nothing is filled up, and the
        result is the optimum. Otherwise the search `surm_jax.structured.refine` goes on from there, because the entries
        that are cut off may have any value.

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
        width_U, width_V = _widths((m, n))
        rows = dense.T if m > n else dense
        rows = jnp.pad(rows, ((0, 0), (0, width_U * width_V - max(m, n))))
        left, S, right = jnp.linalg.svd(rows.reshape(min(m, n), width_V, width_U), full_matrices=False)
        start = cls(U=S[:, :1] * right[:, 0], V=left[..., 0], shape=(m, n))
        return start if width_U * width_V == max(m, n) else refine(start, dense, steps=steps, progress=progress)

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: `V` and `U`, with the symbol of the Khatri-Rao product between them."""
        return [Piece("V", {"V": ("V", ...)}), "\\odot", Piece("U", {"U": ("U", ...)})]

    @property
    def T(self) -> "KhatriRao":
        """The transpose, with the same arrays and the other value of `transposed`."""
        return KhatriRao(self.U, self.V, self.shape[::-1], not self.transposed)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return x @ self._dense()

    def _dense(self) -> Float[Array, "in out"]:
        longer = max(self.shape)
        rows = (self.V[:, :, None] * self.U[:, None, :]).reshape(self.U.shape[0], -1)[:, :longer]
        return rows.T if self.transposed else rows


def _widths(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the widths of U and V. Their product is at least the longer side of the matrix."""
    width = math.isqrt(min(shape))
    return width, -(-max(shape) // width)
