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
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.errors import UserError
from surm_jax.structured.base import checked_shape, static
from surm_jax.structured.families.base import Family, checked_dense, family

_CHUNKED = ("decouple", "rotate")

COMPRESSIONS = ("modulo", "contiguous", "truncate", *_CHUNKED)
"""The ways in which a `Tiled` matrix compresses its inputs."""

DECOMPRESSIONS = ("modulo", "contiguous", "truncate")
"""The ways in which a `Tiled` matrix decompresses its results."""


@family
class Tiled(Family):
    """Large matrix made of copies of a small matrix `M`, which MoRA (arXiv 2405.12130) adds to kernels.

    `M` has the shape (p, p'). Its transpose is the array `lora_A.weight` in the released code of MoRA. The static field
    `compress` says how the inputs become p numbers, which M multiplies:

    - "modulo" (equation 6, types 1 and 4 of the released code): a row of x is divided into chunks of p features, which
      are summed. If p does not divide in_features, the row is extended with its own first features, x[i] = x[i - in]
      for i >= in, to the end of the last chunk, so that these features are used twice.
    - "contiguous" (types 2 and 3): the row is divided into p groups of neighbours, which are summed. If the groups
      cannot be equal, the first ones are longer by 1.
    - "truncate" (equation 5): the first p features are used.

    The field `decompress` says how the p' results become outputs: they are repeated as a whole ("modulo", types 1 and
    3), each of them is repeated ("contiguous", types 2 and 4), or zeros follow them ("truncate"). The rank is that of
    M. A row of x takes about in + p p' + out operations. Two other values of `compress` use each chunk by itself, so
    that the rank can be min(in, out). The field `decompress` keeps its default with them:

    - "rotate" (equation 9, type 6): chunk c of x, `x[c p : (c + 1) p]`, is rotated as in a rotary
      position embedding (arXiv 2104.09864). The entries a and a + p / 2, for a < p / 2, are the two coordinates of a
      plane, and are rotated by the angle `c / 10000^(2a / p)`. Then the chunk is multiplied by M. The results of all
      chunks are concatenated. If the output is too long, it is truncated, and if it is too short, it is repeated. So
      chunk c of x gives chunk c of y, and the rank can be min(in, out). If out p < in p', the chunks of x whose results
      would lie beyond the end of the output have no effect. A row of x takes in p' multiplications.
    - "decouple" (equation 8): the same without rotation.

    Attributes:
        M: (p, p'), p <= in and p' <= out, with an even p for "rotate". It is zero when training starts. In the paper it
            is square.
        shape: `(in_features, out_features)`.
        compress: How the inputs become rows of M, one of `COMPRESSIONS`.
        decompress: How the products become outputs, one of `DECOMPRESSIONS`.
        transposed: Whether this is the transpose of the matrix in the formulas. The formulas extend and rotate the
            input but not the output, so the transpose has no such formula and sets this flag instead.

    >>> Tiled(jnp.array([[1.0, 2.0], [3.0, 4.0]]), shape=(4, 5)).to_dense()
    Array([[1., 2., 1., 2., 1.],
           [3., 4., 3., 4., 3.],
           [1., 2., 1., 2., 1.],
           [3., 4., 3., 4., 3.]], dtype=float32)
    """

    option_names = ("side", "compress", "decompress")

    M: Float[Array, "p q"]
    shape: tuple[int, int] = static()
    compress: str = static(default="modulo")
    decompress: str = static(default="modulo")
    transposed: bool = static(default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        _check_names(self.compress, self.decompress)
        if self.M is None:
            return
        self._check_dimensions(M="(p, p')")
        p, q = self.M.shape
        self._check_leaf("M", (p, q))
        m, n = self._forward_shape
        if not (1 <= p <= m and 1 <= q <= n) or (self.compress == "rotate" and p % 2):
            even = ", with an even number of rows" * (self.compress == "rotate")
            raise UserError(f"Tiled: M must have a shape from 1 x 1 to {m} x {n}{even}, not {p} x {q}")

    @property
    def side(self) -> int:
        """The number of rows or the number of columns of `M`, whichever is larger."""
        return max(self.M.shape[-2:])

    @property
    def small_residuals(self) -> bool:
        """True unless chunks are used by themselves: the backward pass needs only their sum, of shape (..., p).

        With rotation, the backward pass needs the whole rotated input.
        """
        return self.compress not in _CHUNKED

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        *,
        scale: float,
        side: int,
        compress: str = "modulo",
        decompress: str = "modulo",
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
            compress: How the inputs become rows of M, one of `COMPRESSIONS`.
            decompress: How the products become outputs, one of `DECOMPRESSIONS`.
            dtype: Dtype of `M`.

        Raises:
            UserError: The shape is not two positive integers, the side is not possible for it, or a name is unknown.
        """
        shape = checked_shape(cls.__name__, shape)
        M = jnp.zeros(_sizes(shape, side, compress), dtype)
        return cls(M=M, shape=shape, compress=compress, decompress=decompress)

    @classmethod
    def nearest(
        cls, dense: Float[Array, "in out"], *, side: int, compress: str = "modulo", decompress: str = "modulo"
    ) -> Self:
        """Return the matrix of this family nearest to `dense` in the Frobenius norm, with `transposed = False`.

        The dense form contains several copies of every column of M, so the best M is computed from means over parts of
        `dense`:

        - With chunks, the diagonal blocks of the dense form are copies of M, rotated for "rotate". The best M is the
          mean of these blocks of `dense`, rotated back.
        - Otherwise, the dense form is C M, with its columns repeated, where `x @ C` compresses a row of x. The best M
          is the pseudo-inverse of C times the mean of the corresponding columns of `dense`.

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            side: Number of rows and columns of `M`, as in `init`.
            compress: One of `COMPRESSIONS`.
            decompress: One of `DECOMPRESSIONS`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the side is not possible for it.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        p, q = _sizes((m, n), side, compress)
        _check_names(compress, decompress)
        if compress in _CHUNKED:
            count = _chunks((m, n), (p, q))
            columns = _repeat(_fold(dense, count * q).T, count * p).reshape(count, q, count, p)
            blocks = jnp.diagonal(columns, axis1=0, axis2=2).swapaxes(1, 2)  # (q, chunks, p)
            M = jnp.sum(_turn(blocks, 1) if compress == "rotate" else blocks, axis=1).T
        else:
            inverse = jnp.asarray(np.linalg.pinv(_compression(m, p, compress)), dense.dtype)
            M = jnp.matmul(inverse, _gather(dense, q, decompress), precision=jax.lax.Precision.HIGHEST)
        # The number of copies of each column of M in the dense form.
        copies = _gather(jnp.ones(n, dense.dtype), q, decompress)
        return cls(M=M / copies[None], shape=(m, n), compress=compress, decompress=decompress)

    @classmethod
    def options_from(cls, shape: tuple[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the side with which `M` has about as many parameters as LoRA of rank `settings["rank"]`."""
        return {"side": tiled_side(shape, settings["rank"])}

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest side with which `M` has at most `budget` parameters, or None if no side is possible.

        The other options keep their defaults, so the matrix uses sharing.
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
        return {"side": sharing}, {"side": rotation, "compress": "rotate"}

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
        if self.compress not in _CHUNKED:
            if not self.transposed:
                return _spread(_compress(x, p, self.compress) @ self.M, n, self.decompress)
            return _compress_back(_gather(x, q, self.decompress) @ self.M.T, m, self.compress)
        count = _chunks((m, n), (p, q))
        if not self.transposed:
            h = self._turn(_repeat(x, count * p).reshape(*x.shape[:-1], count, p), 1)
            return _repeat((h @ self.M).reshape(*x.shape[:-1], count * q), n)
        # The transposed product applies the adjoint of each step in reverse order. `_fold` is the adjoint of `_repeat`.
        h = _fold(x, count * q).reshape(*x.shape[:-1], count, q) @ self.M.T
        return _fold(self._turn(h, -1).reshape(*x.shape[:-1], count * p), m)

    def _dense(self) -> Float[Array, "in out"]:
        m, n = self._forward_shape
        p, q = self.M.shape
        # W is the transpose of the dense form in the formulas of the class, and has the shape (out, in).
        if self.compress in _CHUNKED:
            count = _chunks((m, n), (p, q))
            blocks = self._turn(jnp.broadcast_to(self.M.T[:, None], (q, count, p)), -1)
            diagonal = jnp.eye(count, dtype=blocks.dtype)[:, None, :, None] * blocks[None]
            W = _fold(_repeat(diagonal.reshape(count * q, count * p).T, n).T, m)
        else:
            W = _compress_back(_spread(self.M, n, self.decompress).T, m, self.compress)
        return W if self.transposed else W.T

    def _turn(self, x: Float[Array, "*batch chunks p"], sign: int) -> Float[Array, "*batch chunks p"]:
        return _turn(x, sign) if self.compress == "rotate" else x


def tiled_side(shape: tuple[int, int], rank: int, *, rotate: bool = False, down: bool = False) -> int:
    """Return the side of a square matrix with about as many parameters as LoRA of a given rank.

    It is `sqrt((in + out) rank)`, which the MoRA paper writes as r with a hat. It is rounded to the nearest integer, as
    in the released code, or down, as in the paper. For rotation it is then rounded down to an even integer, but not
    below 2.

    Args:
        shape: `(in_features, out_features)`.
        rank: The rank of LoRA.
        rotate: Whether the side is for rotation instead of sharing.
        down: Whether to round down.

    Raises:
        UserError: The shape is not two positive integers, or the rank is not a positive integer.

    >>> tiled_side((768, 768), rank=1), tiled_side((768, 768), rank=1, rotate=True)
    (39, 38)
    """
    m, n = checked_shape("tiled_side", shape)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"tiled_side: rank must be a positive integer, not {rank!r}")
    side = math.isqrt((m + n) * rank) if down else int(math.sqrt((m + n) * rank) + 0.5)
    return max(2, side // 2 * 2) if rotate else side


def _check_names(compress: str, decompress: str) -> None:
    for name, value, known in (("compress", compress, COMPRESSIONS), ("decompress", decompress, DECOMPRESSIONS)):
        if value not in known:
            raise UserError(f"Tiled: {name} must be one of {', '.join(known)}, not {value!r}")
    if compress in _CHUNKED and decompress != "modulo":
        raise UserError(f"Tiled: decompress={decompress} has no effect with compress={compress}: leave it at modulo")


def _sizes(shape: tuple[int, int], side: int, compress: str) -> tuple[int, int]:
    """Return the shape of M for a large matrix of this shape: `side` x `side`, but no larger than the large matrix."""
    m, n = shape
    if not isinstance(side, int) or side < 1:
        raise UserError(f"Tiled: side must be a positive integer, not {side!r}")
    if compress != "rotate":
        return min(side, m), min(side, n)
    if side % 2 or m < 2:
        raise UserError(
            f"Tiled: rotation turns pairs of features, so side must be even and in_features at least 2, "
            f"not {side} and {m}"
        )
    return min(side, m - m % 2), min(side, n)


def _chunks(shape: tuple[int, int], sizes: tuple[int, int]) -> int:
    """Return how many chunks are used: the number in the input, or in the output if that has fewer."""
    (m, n), (p, q) = shape, sizes
    return min(-(-m // p), -(-n // q))


def _compress(x: Float[Array, "*batch m"], p: int, how: str) -> Float[Array, "*batch p"]:
    """Return the p numbers to which a row of x is compressed."""
    return _gather(_repeat(x, -(-x.shape[-1] // p) * p) if how == "modulo" else x, p, how)


def _compress_back(h: Float[Array, "*batch p"], m: int, how: str) -> Float[Array, "*batch m"]:
    """Multiply by the transpose of the matrix by which `_compress` multiplies."""
    p = h.shape[-1]
    return _fold(_repeat(h, -(-m // p) * p), m) if how == "modulo" else _spread(h, m, how)


def _spread(h: Float[Array, "*batch k"], n: int, how: str) -> Float[Array, "*batch n"]:
    """Return h spread over n places, as the attribute `decompress` says."""
    k = h.shape[-1]
    if how == "modulo":
        return _repeat(h, n)
    if how == "truncate":
        return jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, n - k)])
    return jnp.repeat(h, _groups(n, k), axis=-1, total_repeat_length=n)


def _gather(x: Float[Array, "*batch n"], k: int, how: str) -> Float[Array, "*batch k"]:
    """Multiply by the transpose of the matrix by which `_spread` multiplies: sum or select features of x."""
    if how == "modulo":
        return _fold(x, k)
    if how == "truncate":
        return x[..., :k]
    size, longer = divmod(x.shape[-1], k)
    cut = longer * (size + 1)
    first = x[..., :cut].reshape(*x.shape[:-1], longer, size + 1).sum(-1)
    return jnp.concatenate([first, x[..., cut:].reshape(*x.shape[:-1], k - longer, size).sum(-1)], axis=-1)


def _groups(n: int, k: int) -> Int[np.ndarray, " k"]:
    """Return the sizes of k groups of n neighbours, of which the first ones are longer by 1 if necessary."""
    return np.array([n // k + (group < n % k) for group in range(k)])


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


def _compression(m: int, p: int, how: str) -> Float[np.ndarray, "m p"]:
    """Return the matrix C for which `x @ C` compresses a row of x."""
    C = np.zeros((m, p))
    if how == "modulo":
        places = np.arange(-(-m // p) * p)
        np.add.at(C, (places % m, places % p), 1)
    elif how == "truncate":
        C[:p] = np.eye(p)
    else:
        C[np.arange(m), np.repeat(np.arange(p), _groups(m, p))] = 1
    return C
