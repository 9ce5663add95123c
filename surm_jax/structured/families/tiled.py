"""Large matrices made of copies of a small matrix, which MoRA (arXiv 2405.12130) adds to kernels.

MoRA multiplies a compressed input by a small square matrix and decompresses the result. So the large matrix can have a
high rank with few parameters. Compression and decompression have no parameters, so the large matrix is linear in the
small one. The paper does not say what happens if the side of the small matrix does not divide in_features or
out_features. Here the input is extended to a whole number of chunks with its own first features, and the output is
truncated, as in the released code (https://github.com/kongds/MoRA).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import checked_shape, static
from surm_jax.structured.families.base import Family, checked_dense, family


@family
class Tiled(Family):
    """Large matrix made of copies of a small matrix `M`, which MoRA (arXiv 2405.12130) adds to kernels.

    `M` has the shape (p, p'). Its transpose is the array `lora_A.weight` in the released code of MoRA. A row of x is
    divided into chunks of p features. If p does not divide in_features, the row is extended with its own first
    features, x[i] = x[i - in] for i >= in, to the end of the last chunk. There are two ways to multiply the chunks by
    M:

    - Sharing (equation 6, type 1 of the released code): the chunks are summed, the sum is multiplied by M, and the p'
      results are repeated along the output, `y[j] = sum_i x[i] M[i mod p, j mod p']`. If p divides in_features, the
      entry (i, j) of the dense form is `M[i mod p, j mod p']`. Otherwise the features that extend the last chunk are
      used twice. The rows of the dense form for these features are sums of two rows of M, repeated to the length of the
      output. The rank is that of M. A row of x takes in + p p' + out operations.
    - Rotation (equation 9, type 6 of the released code): chunk c of x, `x[c p : (c + 1) p]`, is rotated as in a rotary
      position embedding (arXiv 2104.09864). The entries a and a + p / 2, for a < p / 2, are the two coordinates of a
      plane, and are rotated by the angle `c / 10000^(2a / p)`. Then the chunk is multiplied by M. The results of all
      chunks are concatenated. If the output is too long, it is truncated, and if it is too short, it is repeated. So
      chunk c of x gives chunk c of y, and the rank can be min(in, out). If out p < in p', the chunks of x whose results
      would lie beyond the end of the output have no effect. A row of x takes in p' multiplications.

    Attributes:
        M: (p, p'), p <= in and p' <= out, with an even p for rotation. It is zero when training starts. In the paper it
            is square.
        shape: `(in_features, out_features)`.
        rotate: Whether to use rotation instead of sharing.
        transposed: Whether this is the transpose of the matrix in the formulas. The formulas extend and rotate the
            input but not the output, so the transpose has no such formula and sets this flag instead.

    >>> Tiled(jnp.array([[1.0, 2.0], [3.0, 4.0]]), shape=(4, 5)).to_dense()
    Array([[1., 2., 1., 2., 1.],
           [3., 4., 3., 4., 3.],
           [1., 2., 1., 2., 1.],
           [3., 4., 3., 4., 3.]], dtype=float32)
    """

    option_names = ("side", "rotate")

    M: Float[Array, "p q"]
    shape: tuple[int, int] = static()
    rotate: bool = static(default=False)
    transposed: bool = static(default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        if self.M is None:
            return
        self._check_dimensions(M="(p, p')")
        p, q = self.M.shape
        self._check_leaf("M", (p, q))
        m, n = self._forward_shape
        if not (1 <= p <= m and 1 <= q <= n) or (self.rotate and p % 2):
            raise UserError(
                f"Tiled: M must have a shape from 1 x 1 to {m} x {n}{', with an even number of rows' * self.rotate}, "
                f"not {p} x {q}"
            )

    @property
    def side(self) -> int:
        """The number of rows or the number of columns of `M`, whichever is larger."""
        return max(self.M.shape[-2:])

    @property
    def small_residuals(self) -> bool:
        """True for sharing, whose backward pass needs only the sum of the chunks, of shape (..., p).

        With rotation, the backward pass needs the whole rotated input.
        """
        return not self.rotate

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        *,
        scale: float,
        side: int,
        rotate: bool = False,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Return the zero matrix, with which training starts.

        No array is random. The matrix is linear in `M`, so the gradient of `M` is not zero at the start.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            side: Number of rows and columns of `M`. If in_features or out_features is less than the side, `M` has
                accordingly fewer rows or columns. The side must be even for rotation. `tiled_side` returns the side
                that MoRA uses.
            rotate: Whether to use rotation instead of sharing.
            dtype: Dtype of `M`.

        Raises:
            UserError: The shape is not two positive integers, or the side is not possible for it.
        """
        shape = checked_shape(cls.__name__, shape)
        return cls(M=jnp.zeros(_sizes(shape, side, rotate), dtype), shape=shape, rotate=rotate)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, side: int, rotate: bool = False) -> Self:
        """Return the matrix of this family nearest to `dense` in the Frobenius norm, with `transposed = False`.

        The dense form contains several copies of every column of M, so the best M is computed from means over parts of
        `dense`:

        - Rotation: the diagonal blocks of the dense form are rotated copies of M. The best M is the mean of these
          blocks of `dense`, rotated back.
        - Sharing: the dense form is P M, with its columns repeated. Here P is the in x p matrix for which `x @ P`
          extends a row of x and sums its chunks. The best M is the pseudo-inverse of P times the mean of the
          corresponding columns of `dense`. If p divides in_features, this is the mean of all p x p' tiles of `dense`.

        Sharing takes O(in * out * p) operations, and rotation takes O(in * out).

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            side: Number of rows and columns of `M`, as in `init`.
            rotate: Whether to use rotation instead of sharing.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the side is not possible for it.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        p, q = _sizes((m, n), side, rotate)
        # The number of copies of each column of M in the dense form.
        copies = _fold(jnp.ones(n, dense.dtype), q)
        if rotate:
            count = _chunks((m, n), (p, q), rotate)
            columns = _repeat(_fold(dense, count * q).T, count * p).reshape(count, q, count, p)
            blocks = jnp.diagonal(columns, axis1=0, axis2=2)  # (q, p, chunks)
            M = jnp.sum(_turn(blocks.swapaxes(1, 2), 1), axis=1).T
        else:
            inverse = jnp.asarray(np.linalg.pinv(_compression(m, p)), dense.dtype)
            M = jnp.matmul(inverse, _fold(dense, q), precision=jax.lax.Precision.HIGHEST)
        return cls(M=M / copies[None], shape=(m, n), rotate=rotate)

    @classmethod
    def options_from(cls, shape: tuple[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the side with which `M` has about as many parameters as LoRA of rank `settings["rank"]`."""
        return {"side": tiled_side(shape, settings["rank"])}

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest side with which `M` has at most `budget` parameters, or None if no side is possible.

        The option `rotate` keeps its default, so the matrix uses sharing.
        """
        # If the side exceeds the smaller of in_features and out_features, M grows only along the larger one.
        square = math.isqrt(max(0, budget))
        side = square if square <= min(shape) else min(budget // min(shape), max(shape))
        return {"side": side} if side else None

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the two sets of options with which the benchmarks measure speed: for sharing and for rotation.

        With each set, `M` has about as many parameters as LoRA of rank 1.
        """
        sharing, rotation = (tiled_side(shape, 1, rotate=rotate) for rotate in (False, True))
        return {"side": sharing}, {"side": rotation, "rotate": True}

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((6, 8), side=3)

    @property
    def T(self) -> "Tiled":
        """The transpose: the same `M`, with the opposite value of `transposed`."""
        return dataclasses.replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    @property
    def _forward_shape(self) -> tuple[int, int]:
        """The shape (in, out) in the formulas of the class docstring, which describe this matrix or its transpose."""
        return self.shape[::-1] if self.transposed else self.shape

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        m, n = self._forward_shape
        p, q = self.M.shape
        count = _chunks((m, n), (p, q), self.rotate)
        if not self.transposed:
            h = _repeat(x, count * p)
            h = _turn(h.reshape(*x.shape[:-1], count, p), 1) if self.rotate else _fold(h, p)
            return _repeat((h @ self.M).reshape(*x.shape[:-1], count * q if self.rotate else q), n)
        # The transposed product applies the adjoint of each step in reverse order. `_fold` is the adjoint of `_repeat`.
        if not self.rotate:
            return _fold(_repeat(_fold(x, q) @ self.M.T, count * p), m)
        h = _fold(x, count * q).reshape(*x.shape[:-1], count, q) @ self.M.T
        return _fold(_turn(h, -1).reshape(*x.shape[:-1], count * p), m)

    def _dense(self) -> Float[Array, "in out"]:
        m, n = self._forward_shape
        p, q = self.M.shape
        count = _chunks((m, n), (p, q), self.rotate)
        # W is the transpose of the dense form in the formulas of the class, and has the shape (out, in).
        if self.rotate:
            blocks = _turn(jnp.broadcast_to(self.M.T[:, None], (q, count, p)), -1)
            diagonal = jnp.eye(count, dtype=blocks.dtype)[:, None, :, None] * blocks[None]
            W = _repeat(diagonal.reshape(count * q, count * p).T, n).T
        else:
            W = _repeat(_repeat(self.M, n).T, count * p)
        W = _fold(W, m)
        return W if self.transposed else W.T


def tiled_side(shape: tuple[int, int], rank: int, *, rotate: bool = False) -> int:
    """Return the side of a square matrix with about as many parameters as LoRA of a given rank.

    It is `sqrt((in + out) rank)`, which the MoRA paper writes as r with a hat. It is rounded to the nearest integer, as
    in the released code, while the paper rounds down. For rotation it is then rounded down to an even integer, but not
    below 2.

    Args:
        shape: `(in_features, out_features)`.
        rank: The rank of LoRA.
        rotate: Whether the side is for rotation instead of sharing.

    Raises:
        UserError: The shape is not two positive integers, or the rank is not a positive integer.

    >>> tiled_side((768, 768), rank=1), tiled_side((768, 768), rank=1, rotate=True)
    (39, 38)
    """
    m, n = checked_shape("tiled_side", shape)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"tiled_side: rank must be a positive integer, not {rank!r}")
    side = int(math.sqrt((m + n) * rank) + 0.5)
    return max(2, side // 2 * 2) if rotate else side


def _sizes(shape: tuple[int, int], side: int, rotate: bool) -> tuple[int, int]:
    """Return the shape of M for a large matrix of this shape: `side` x `side`, but no larger than the large matrix."""
    m, n = shape
    if not isinstance(side, int) or side < 1:
        raise UserError(f"Tiled: side must be a positive integer, not {side!r}")
    if not rotate:
        return min(side, m), min(side, n)
    if side % 2 or m < 2:
        raise UserError(
            f"Tiled: rotation turns pairs of features, so side must be even and in_features at least 2, "
            f"not {side} and {m}"
        )
    return min(side, m - m % 2), min(side, n)


def _chunks(shape: tuple[int, int], sizes: tuple[int, int], rotate: bool) -> int:
    """Return the number of chunks of the input that the product uses.

    Sharing uses all chunks. Rotation uses at most as many chunks as the output has chunks of p' features.
    """
    (m, n), (p, q) = shape, sizes
    return min(-(-m // p), -(-n // q)) if rotate else -(-m // p)


def _repeat(x: Float[Array, "*batch k"], n: int) -> Float[Array, "*batch n"]:
    """Return x repeated along its last axis to the length n, `y[j] = x[j mod k]`."""
    *batch, k = x.shape
    copies = -(-n // k)
    if copies == 1:
        return x[..., :n]
    # This broadcasts instead of concatenating, because XLA does not fuse other operations into a concatenation.
    return jnp.broadcast_to(x[..., None, :], (*batch, copies, k)).reshape(*batch, copies * k)[..., :n]


def _fold(x: Float[Array, "*batch n"], k: int) -> Float[Array, "*batch k"]:
    """Sum all chunks of k entries of the last axis: `y[a]` is the sum of all x[j] with j mod k = a.

    This is the adjoint of `_repeat`.
    """
    *batch, n = x.shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -n % k)])
    return jnp.sum(x.reshape(*batch, -(-n // k), k), axis=-2) if n > k else x


def _turn(x: Float[Array, "*batch chunks p"], sign: int) -> Float[Array, "*batch chunks p"]:
    """Rotate every chunk c of x by the angles that the class docstring gives, or back if `sign` is -1."""
    chunks, p = x.shape[-2:]
    cos, sin = (
        jnp.expand_dims(jnp.asarray(table, x.dtype), tuple(range(x.ndim - 2))) for table in _tables(chunks, p, sign)
    )
    first, second = x[..., : p // 2], x[..., p // 2 :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.cache
def _tables(chunks: int, p: int, sign: int) -> tuple[Float[np.ndarray, "chunks p/2"], Float[np.ndarray, "chunks p/2"]]:
    """Return the cosines of the rotation angles of all chunks, and `sign` times the sines, in float64."""
    angles = np.outer(np.arange(chunks), 10000.0 ** (-2 * np.arange(p // 2) / p))
    return np.cos(angles), sign * np.sin(angles)


def _compression(m: int, p: int) -> Float[np.ndarray, "m p"]:
    """Return the matrix P for which `x @ P` extends x to a whole number of chunks of length p and sums the chunks."""
    P, places = np.zeros((m, p)), np.arange(-(-m // p) * p)
    np.add.at(P, (places % m, places % p), 1)
    return P
