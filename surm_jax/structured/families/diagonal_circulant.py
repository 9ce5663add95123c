"""Circulant matrices between two diagonal matrices, which CDVFT (arXiv 2505.00580) adds to kernels.

The paper writes `W x` with `W = diag(a_3) circ(c_2) diag(a_1)`, and also longer products of the same kind. For a longer
product, multiply matrices of this family by `@`. Here `y = x @ M` with `M = W^T`, so `a_1` still multiplies the input.
"""

from typing import Self

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.structured.base import TIMES, Piece, checked_shape
from surm_jax.structured.families.base import Family, checked_dense, family, scaled_normal
from surm_jax.structured.families.circulant import Circulant
from surm_jax.structured.fit import refine


@family
class DiagonalCirculant(Family):
    """Product `M = diag(a) C(c) diag(b)` of a diagonal, a circulant and a diagonal matrix.

    It has in + max(in, out) + out parameters, and x @ M takes as many FFTs as for the circulant matrix `C(c)`
    (`surm_jax.structured.Circulant`). If in and out differ, C(c) is the top-left block of a square circulant matrix,
    where the paper divides the circulant matrix into blocks. The parameters are not unique: a, c and b can be
    multiplied by three numbers with the product 1.

    Attributes:
        c: (max(in_features, out_features),), the first row of C(c). It is zero when training starts.
        a: (in_features,), the factors of the inputs. They are random when training starts.
        b: (out_features,), the factors of the outputs. They are random when training starts.

    >>> DiagonalCirculant(c=jnp.array([1.0, 2.0]), a=jnp.array([1.0, 10.0]), b=jnp.array([1.0, 3.0])).to_dense()
    Array([[ 1.,  6.],
           [20., 30.]], dtype=float32)
    """

    searches = True
    _title = "diagonal circulant"

    c: Float[Array, " N"]
    a: Float[Array, " in"]
    b: Float[Array, " out"]

    def __post_init__(self) -> None:
        if self.c is None and self.a is None and self.b is None:
            return
        self._check_dimensions(a="(in_features)", b="(out_features)")
        self._check_leaf("a", self.shape[:1])
        self._check_leaf("b", self.shape[1:])
        self._check_leaf("c", (max(self.shape),))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `(in_features, out_features)` of `M`."""
        return self.a.shape[-1], self.b.shape[-1]

    @classmethod
    def init(cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, dtype: DTypeLike = jnp.float32) -> Self:
        """Return the matrix with which training starts: it is zero, with `c = 0`, and a and b `scale * N(0, 1)`.

        Args:
            key: Random key for `a` and `b`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `a` and `b`.
            dtype: Dtype of all arrays.

        Raises:
            UserError: The shape is not two positive integers.
        """
        m, n = checked_shape(cls.__name__, shape)
        both = scaled_normal(key, (m + n,), scale, dtype)
        return cls(c=jnp.zeros(max(m, n), dtype), a=both[:m], b=both[m:])

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, steps: int = 200, progress: bool = False) -> Self:
        """Return a matrix of this family near to `dense` in the Frobenius norm, found by a search.

        The nearest matrix has no closed form. The search `surm_jax.structured.refine` starts from the nearest circulant
        matrix, with ones in a and b, so the result is never further from `dense` than that.

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
        # The search works on a target with entries up to 1, because a, b and c scale with different powers of its size.
        unit = jnp.max(jnp.abs(dense))
        unit = jnp.where(unit > 0, unit, 1)
        ones = jnp.ones(m + n, dense.dtype)
        start = cls(c=Circulant.nearest(dense / unit).c, a=ones[:m], b=ones[m:])
        found = refine(start, dense / unit, steps=steps, progress=progress)
        return cls(c=unit * found.c, a=found.a, b=found.b)

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: the circulant matrix between the signs for both diagonal matrices."""
        circulant = Piece("C(c)", {"c": ("c", ...)}, self._circulant)
        return ["\\mathrm{diag}(a)", TIMES, circulant, TIMES, "\\mathrm{diag}(b)"]

    @property
    def T(self) -> "DiagonalCirculant":
        """The transpose, in which the circulant matrix is transposed, and a and b are exchanged."""
        return DiagonalCirculant(c=self._circulant.T.c, a=self.b, b=self.a)

    @property
    def _circulant(self) -> Circulant:
        return Circulant(self.c, shape=self.shape)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return _scaled(self._circulant._apply(_scaled(x, self.a)), self.b)

    def _dense(self) -> Float[Array, "in out"]:
        return _scaled(self.a[:, None] * self._circulant._dense(), self.b)


def _scaled(x: Float[Array, "*batch n"], factors: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    """Return x with its last axis multiplied by the factors."""
    return x * jnp.broadcast_to(factors, x.shape)
