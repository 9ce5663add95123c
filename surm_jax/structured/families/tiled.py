"""A small matrix written over a large one in tiles: MoRA's update (arXiv 2405.12130), of high rank for few numbers.

MoRA multiplies a compressed input with a small square matrix and decompresses the result. Neither step has parameters,
so the whole is one matrix, linear in the small one. The paper does not say what happens if its side does not divide the
sizes. Here, as in the released code (https://github.com/kongds/MoRA), the input is continued by its own first features
to whole chunks, and the output is cut.
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
    """Matrix made of copies of a small `M`, as MoRA (arXiv 2405.12130) writes them; `lora_A.weight` there is `M^T`.

    Below, a row of x is continued by itself, x[i] = x[i - in] from i = in on, up to the end of its last chunk of p.

    - Sharing (equation 6, type 1 of the released code): the features that are equal modulo p are summed, and the p'
      results repeated along the output, `y[j] = sum_i x[i] M[i mod p, j mod p']`. Where p divides in, the dense form is
      `M[i mod p, j mod p']`; otherwise the rows of the features that continue the last chunk have a second term. The
      rank is that of M. in + p p' + out operations a row.
    - Rotation (equation 9, type 6): chunk c of x, `x[c p : (c + 1) p]`, is turned by the angles `c / 10000^(2a / p)`
      of a rotary position embedding (arXiv 2104.09864) in the planes of its entries a and a + p / 2, a < p / 2, and
      multiplied with M. The results one after the other are the output: cut where they are too long, repeated where
      they are too short. So chunk c goes to chunk c, and the rank is up to min(in, out). Where out p < in p', the
      features after the first out p / p' have no effect. in p' multiplications a row.

    Attributes:
        M: (p, p'), p <= in and p' <= out, even p for rotation; zero at the start. Square in the paper.
        shape: `(in_features, out_features)`.
        rotate: Whether to rotate instead of sharing.
        transposed: Whether this is the transpose. Only chunks of the input are continued and rotated, so the structure
            stores the direction.

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
                f"Tiled: M must have a shape from 1 x 1 to {m} x {n}{', of an even number of rows' * self.rotate}, "
                f"not {p} x {q}"
            )

    @property
    def side(self) -> int:
        """Rows or columns of `M`, whichever are more."""
        return max(self.M.shape[-2:])

    @property
    def small_residuals(self) -> bool:
        """True for sharing, which keeps the compressed input, (..., p); rotation keeps all of it."""
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
        """Return the zero matrix. It is linear in `M`, which learns from zero: `key` and `scale` are not used.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            side: Rows and columns of `M`, at most as many as there are features. It must be even for rotation.
                `tiled_side` gives that of the paper.
            rotate: Whether to rotate instead of sharing.
            dtype: Type of `M`.

        Raises:
            UserError: The shape is not two positive integers, or the side is not possible for it.
        """
        shape = checked_shape(cls.__name__, shape)
        return cls(M=jnp.zeros(_sizes(shape, side, rotate), dtype), shape=shape, rotate=rotate)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, side: int, rotate: bool = False) -> Self:
        """Return the tiled matrix (not transposed) nearest to `dense` in the Frobenius norm.

        The matrix is linear in `M`, and each column of M has copies among the columns of the dense form:

        - Rotation: the blocks of the dense form are M, rotated. The best M is the mean of the target's blocks, rotated
          back.
        - Sharing: all copies go through the same in x p matrix P of compression. The best M is the pseudo-inverse of P
          times the mean of the target's columns. If p divides in, this is the mean of the tiles.

        O(in * out * p) for sharing and O(in * out) for rotation.

        Args:
            dense: (in_features, out_features).
            side: As in `init`.
            rotate: As in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the side is not possible for it.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        p, q = _sizes((m, n), side, rotate)
        # How many columns of the dense form are copies of each column of M.
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
        """Return a side with as many numbers as LoRA of the rank in the settings (`tiled_side`)."""
        return {"side": tiled_side(shape, settings["rank"])}

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest side that the budget allows."""
        # A side beyond one of the sizes counts only in the other direction.
        square = math.isqrt(max(0, budget))
        side = square if square <= min(shape) else min(budget // min(shape), max(shape))
        return {"side": side} if side else None

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options that benchmarks time."""
        sharing, rotation = (tiled_side(shape, 1, rotate=rotate) for rotate in (False, True))
        return {"side": sharing}, {"side": rotation, "rotate": True}

    @classmethod
    def example(cls) -> Self:
        """Return a small random member, always the same."""
        return cls.random((6, 8), side=3)

    @property
    def T(self) -> "Tiled":
        """The transpose: the same numbers with `transposed` flipped."""
        return dataclasses.replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    @property
    def _forward_shape(self) -> tuple[int, int]:
        """The shape of the matrix in the formulas of the class: this one, or its transpose."""
        return self.shape[::-1] if self.transposed else self.shape

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        m, n = self._forward_shape
        p, q = self.M.shape
        count = _chunks((m, n), (p, q), self.rotate)
        if not self.transposed:
            h = _repeat(x, count * p)
            h = _turn(h.reshape(*x.shape[:-1], count, p), 1) if self.rotate else _fold(h, p)
            return _repeat((h @ self.M).reshape(*x.shape[:-1], count * q if self.rotate else q), n)
        # The adjoint of each step, in reverse: `_fold` and `_repeat` are the adjoints of each other.
        if not self.rotate:
            return _fold(_repeat(_fold(x, q) @ self.M.T, count * p), m)
        h = _fold(x, count * q).reshape(*x.shape[:-1], count, q) @ self.M.T
        return _fold(_turn(h, -1).reshape(*x.shape[:-1], count * p), m)

    def _dense(self) -> Float[Array, "in out"]:
        m, n = self._forward_shape
        p, q = self.M.shape
        count = _chunks((m, n), (p, q), self.rotate)
        # Transposed: (out, in).
        if self.rotate:
            blocks = _turn(jnp.broadcast_to(self.M.T[:, None], (q, count, p)), -1)
            diagonal = jnp.eye(count, dtype=blocks.dtype)[:, None, :, None] * blocks[None]
            W = _repeat(diagonal.reshape(count * q, count * p).T, n).T
        else:
            W = _repeat(_repeat(self.M, n).T, count * p)
        W = _fold(W, m)
        return W if self.transposed else W.T


def tiled_side(shape: tuple[int, int], rank: int, *, rotate: bool = False) -> int:
    """Return the side of a square with as many numbers as LoRA of this rank: `sqrt((in + out) rank)`, MoRA's r-hat.

    It is rounded as in the released code: to the nearest integer (in the paper to the next lower one), and for rotation
    then down to an even one.

    Args:
        shape: `(in_features, out_features)`.
        rank: The rank of LoRA.
        rotate: Whether the side is for rotation.

    Raises:
        UserError: The shape is not two positive integers, or the rank is not one.

    >>> tiled_side((768, 768), rank=1), tiled_side((768, 768), rank=1, rotate=True)
    (39, 38)
    """
    m, n = checked_shape("tiled_side", shape)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"tiled_side: rank must be a positive integer, not {rank!r}")
    side = int(math.sqrt((m + n) * rank) + 0.5)
    return max(2, side // 2 * 2) if rotate else side


def _sizes(shape: tuple[int, int], side: int, rotate: bool) -> tuple[int, int]:
    """Return the sizes of M within a matrix of this shape."""
    m, n = shape
    if not isinstance(side, int) or side < 1:
        raise UserError(f"Tiled: side must be a positive integer, not {side!r}")
    if not rotate:
        return min(side, m), min(side, n)
    if side % 2 or m < 2:
        raise UserError(
            f"Tiled: rotation turns pairs of features, so that side must be even and in_features at least 2, "
            f"not {side} and {m}"
        )
    return min(side, m - m % 2), min(side, n)


def _chunks(shape: tuple[int, int], sizes: tuple[int, int], rotate: bool) -> int:
    """Return how many chunks of the input are read; with rotation at most as many as fit into the output."""
    (m, n), (p, q) = shape, sizes
    return min(-(-m // p), -(-n // q)) if rotate else -(-m // p)


def _repeat(x: Float[Array, "*batch k"], n: int) -> Float[Array, "*batch n"]:
    """Return `y[j] = x[j mod k]` for j < n."""
    *batch, k = x.shape
    copies = -(-n // k)
    if copies == 1:
        return x[..., :n]
    # XLA fuses nothing into a concatenation.
    return jnp.broadcast_to(x[..., None, :], (*batch, copies, k)).reshape(*batch, copies * k)[..., :n]


def _fold(x: Float[Array, "*batch n"], k: int) -> Float[Array, "*batch k"]:
    """Return `y[a]`, the sum of x[j] over all j = a modulo k: the adjoint of `_repeat`."""
    *batch, n = x.shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -n % k)])
    return jnp.sum(x.reshape(*batch, -(-n // k), k), axis=-2) if n > k else x


def _turn(x: Float[Array, "*batch chunks p"], sign: int) -> Float[Array, "*batch chunks p"]:
    """Return every chunk rotated by its angles, or back by them if `sign` is -1."""
    chunks, p = x.shape[-2:]
    cos, sin = (
        jnp.expand_dims(jnp.asarray(table, x.dtype), tuple(range(x.ndim - 2))) for table in _tables(chunks, p, sign)
    )
    first, second = x[..., : p // 2], x[..., p // 2 :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.cache
def _tables(chunks: int, p: int, sign: int) -> tuple[Float[np.ndarray, "chunks p/2"], Float[np.ndarray, "chunks p/2"]]:
    """Return cosine and sine of the angles of every chunk, rounded once from double precision."""
    angles = np.outer(np.arange(chunks), 10000.0 ** (-2 * np.arange(p // 2) / p))
    return np.cos(angles), sign * np.sin(angles)


def _compression(m: int, p: int) -> Float[np.ndarray, "m p"]:
    """Return the matrix P of `x @ P`, which continues x and sums the features that are equal modulo p."""
    P, places = np.zeros((m, p)), np.arange(-(-m // p) * p)
    np.add.at(P, (places % m, places % p), 1)
    return P
