"""Matrices of low displacement rank. Rank 1 includes all circulant matrices, and full rank includes all matrices.

The paper (arXiv 2406.17740) defines a square matrix `W(G, H)` by two arrays G and H of shape (N, r), whose columns are
`g_i` and `h_i`: `W(G, H) = sum_{i<r} Z_1(g_i) Z_{-1}(h_i)`. Each of the r terms is the product of a circulant matrix,
whose first column is `g_i`, and a skew-circulant matrix, whose first column is `h_i`. Here `y = x @ M` with
`M = W(G, H)^T`, so x is multiplied by the skew-circulant matrix first.

The algorithms in this file follow from the displacement equation

    Z_1 W - W Z_{-1} = 2 G (J H)^T,    where J reverses the order of the rows.

`Z_1` and `Z_{-1}` without an argument are the matrices that shift a vector by one place. `Z_1` shifts it cyclically,
and `Z_{-1}` also changes the sign of the entry that wraps around. The left-hand side is called the displacement of W,
and its rank is the displacement rank. The equation holds because circulant matrices commute with `Z_1`, skew-circulant
matrices commute with `Z_{-1}`, `Z_1 - Z_{-1} = 2 e_0 e_{N-1}^T` for the unit vectors `e_i`, and `J h` is the last row
of `Z_{-1}(h)`. `Z_1` and `Z_{-1}` have no eigenvalue in common, so the displacement determines W. Hence a matrix equals
some `W(G, H)` with r columns exactly if the rank of its displacement is at most r.

Along each diagonal of W the equation is a recurrence, from which the dense form is computed. A truncated SVD of the
displacement of a matrix gives G and H.

A rectangular m x n matrix is the top-left m x n block of a square matrix of size `N = max(m, n)`. Inputs are padded
with zeros, and outputs are truncated.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.devices.batch import batch_local
from surm_jax.errors import UserError
from surm_jax.structured.base import TIMES, Piece, checked_shape, static, sum_pieces
from surm_jax.structured.families.base import Family, checked_dense, family, largest_size, scaled_normal
from surm_jax.structured.families.f_circulant import FCirculant
from surm_jax.structured.fit import refine
from surm_jax.structured.products.fourier import inverse_skew_fft, skew_fft


@family
class LowDisplacementRank(Family):
    """Matrix of displacement rank at most r, `M = W(G, H)^T = sum_i Z_{-1}(h_i)^T Z_1(g_i)^T` of arXiv 2406.17740.

    It has 2Nr parameters, N = max(in, out). With r = 1 it can be any circulant or skew-circulant matrix, with r = 2 any
    Toeplitz matrix or the inverse of any square Toeplitz matrix, and with r = min(in, out) any matrix.

    `x @ M` takes 2r + 2 real FFTs of length N per row of x: one of `x`, two for each term, and one inverse FFT of the
    sum of all terms, which are added in the frequency domain. The backward pass takes as many again. The dense form
    takes O(m n r) operations, for a matrix of shape (m, n), and the FFTs for a single row.

    In the first example, H is the first unit vector. So the skew-circulant factor is the identity, and the result is
    the circulant matrix of g. In the second example, G is the first unit vector, and the result is the first two rows
    of the skew-circulant matrix of g.

    Attributes:
        G: (N, r), the first columns of the circulant matrices. It is zero when training starts.
        H: (N, r), the first columns of the skew-circulant matrices. It is random when training starts.
        shape: `(in_features, out_features)`.
        transposed: Whether `M = W(G, H)` instead of `W(G, H)^T`. In the transpose of `W(G, H)`, each skew-circulant
            matrix comes before its circulant matrix. To write the transpose in the form `W(G, H)`, with other arrays G
            and H, up to r + 2 terms would be needed. So the transpose keeps G and H and sets this flag.

    >>> g, h = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0], [0.0], [0.0]])
    >>> LowDisplacementRank(G=g, H=h, shape=(3, 3)).to_dense()  # the circulant of g
    Array([[1., 2., 3.],
           [3., 1., 2.],
           [2., 3., 1.]], dtype=float32)
    >>> LowDisplacementRank(G=h, H=g, shape=(2, 3)).to_dense().round()  # two rows of the skew-circulant
    Array([[ 1.,  2.,  3.],
           [-3.,  1.,  2.]], dtype=float32)
    """

    option_names = ("rank",)
    searches = True
    _title = "W(G, H)"

    G: Float[Array, "N r"]
    H: Float[Array, "N r"]
    shape: tuple[int, int] = static()
    transposed: bool = static(default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(type(self).__name__, self.shape))
        ranks = [leaf.shape[1] for leaf in (self.G, self.H) if len(getattr(leaf, "shape", ())) == 2]
        for name in ("G", "H"):
            self._check_leaf(name, (max(self.shape), *ranks[:1]) if ranks else (max(self.shape), 1))
        if ranks:
            _check_rank(ranks[0], self.shape)

    @property
    def rank(self) -> int:
        """The number r of columns of G and H."""
        return self.G.shape[-1]

    @classmethod
    def init(
        cls, key: PRNGKeyArray, shape: tuple[int, int], *, scale: float, rank: int, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """Return the matrix with which training starts: it is zero, with `G = 0` and `H = scale * N(0, 1)`.

        If both arrays were zero, both gradients would be zero too, and training could not change them.

        Args:
            key: Random key for `H`.
            shape: `(in_features, out_features)`.
            scale: Standard deviation of `H`.
            rank: Number of columns of G and of H, from 1 to max(in_features, out_features).
            dtype: Dtype of both arrays.

        Raises:
            UserError: The shape is not two positive integers, or the rank is not possible for it.
        """
        shape = checked_shape(cls.__name__, shape)
        _check_rank(rank, shape)
        H = scaled_normal(key, (max(shape), rank), scale, dtype)
        return cls(G=jnp.zeros_like(H), H=H, shape=shape)

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, rank: int, steps: int = 200, progress: bool = False) -> Self:
        """Return a matrix `W(G, H)^T` near `dense` in the Frobenius norm, found by two searches.

        The nearest matrix has no closed form. One search starts from the truncated SVD of the displacement of `dense`.
        The other starts from random G and H with about the norm of `dense`, the same in every call. Each search is one
        call of `surm_jax.structured.refine`. The method compares four matrices with `dense`: the results of both
        searches and the best multiple of each result. It returns the nearest of them, which is never further from
        `dense` than the zero matrix. The multiples matter most for `steps = 0`, because the truncated SVD is often
        further from `dense` than the zero matrix.

        Even with `steps = 0` the result equals `dense` in three cases: for every `dense` if the rank is at least min(m,
        n), for a Toeplitz matrix if the rank is at least 2, and for a square matrix whose displacement has at most this
        rank.

        The SVD takes O(N^3) operations, and each step takes O(m n rank).

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            rank: Number of columns of G and of H, from 1 to max(in_features, out_features).
            steps: Largest number of steps of each search. With 0, the method compares the two starts and their best
                multiples.
            progress: Whether to show a progress bar for each search.

        Raises:
            UserError: `dense` is not a floating-point matrix or holds numbers that are not finite, or the rank or the
                number of steps is not possible.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        _check_rank(rank, (m, n))
        starts = _from_displacement(dense, rank), _random(dense, rank)
        return _nearer(*(refine(start, dense, steps=steps, progress=progress) for start in starts), dense)

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the largest rank within the budget of parameters, or None if rank 1 is above the budget."""
        rank = largest_size(budget // (2 * max(shape)), min(shape))
        return {"rank": rank} if rank else None

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: rank 1 and rank 4."""
        del shape
        return {"rank": 1}, {"rank": 4}

    def pieces(self) -> list[Piece | str]:
        """Return what `draw` shows: both factors of each of the first two terms, and dots if there are more.

        The factor by which x is multiplied first is the first in its term.
        """
        size, power = max(self.shape), "" if self.transposed else "^\\top"

        def factor(name: str, f: float, i: int) -> Piece:
            v = self.arrays()[name][:, i]
            matrix = FCirculant(v, shape=(size, size), f=f, transposed=self.transposed)
            return Piece(f"Z_{{{f:.0f}}}({name.lower()}_{i}){power}", {"v": (name, (slice(None), i))}, matrix)

        def term(i: int) -> list[Piece | str]:
            circulant, skew = factor("G", 1.0, i), factor("H", -1.0, i)
            return [circulant, TIMES, skew] if self.transposed else [skew, TIMES, circulant]

        return sum_pieces(self.rank, term)

    @property
    def T(self) -> "LowDisplacementRank":
        """The transpose: the same G and H, with the opposite value of `transposed`."""
        return dataclasses.replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        product = _transposed_product if self.transposed else _product
        return product(x, self.G, self.H)[..., : self.shape[1]]

    def _dense(self) -> Float[Array, "in out"]:
        rows, columns = self.shape if self.transposed else self.shape[::-1]
        W = _block(self.G, self.H, rows, columns)
        return W if self.transposed else W.T


def _check_rank(rank: int, shape: tuple[int, int]) -> None:
    if not isinstance(rank, int) or not 1 <= rank <= max(shape):
        raise UserError(
            f"LowDisplacementRank: a {shape[0]} x {shape[1]} matrix has a displacement rank from 1 to {max(shape)}, "
            f"but {rank!r} was asked for"
        )


@batch_local
def _product(x: Float[Array, "*batch m"], G: Float[Array, "N r"], H: Float[Array, "N r"]) -> Float[Array, "*batch N"]:
    """Return `x @ W(G, H)^T`, which is `W(G, H) x` in the notation of the paper, for every row of `x`."""
    N = G.shape[0]
    G_hat, H_hat = _for_terms(jnp.fft.rfft(G.T), x), _for_terms(skew_fft(H.T, N), x)
    terms = inverse_skew_fft(jnp.expand_dims(skew_fft(x, N), -2) * H_hat, N)
    return jnp.fft.irfft(jnp.sum(jnp.fft.rfft(terms) * G_hat, axis=-2), n=N)


@batch_local
def _transposed_product(
    x: Float[Array, "*batch m"], G: Float[Array, "N r"], H: Float[Array, "N r"]
) -> Float[Array, "*batch N"]:
    """Return `x @ W(G, H)`, the counterpart of `_product`.

    The two factors of each term are exchanged and transposed. Transposing a factor conjugates its spectrum.
    """
    N = G.shape[0]
    G_hat, H_hat = _for_terms(jnp.fft.rfft(G.T), x).conj(), _for_terms(skew_fft(H.T, N), x).conj()
    terms = jnp.fft.irfft(jnp.expand_dims(jnp.fft.rfft(x, n=N), -2) * G_hat, n=N)
    return inverse_skew_fft(jnp.sum(skew_fft(terms, N) * H_hat, axis=-2), N)


def _for_terms(spectra: Array, x: Array) -> Array:
    """Add leading axes of size 1 to `spectra`, of shape (r, k), one for each batch dimension of `x`."""
    return jnp.expand_dims(spectra, tuple(range(x.ndim - 1)))


def _block(G: Float[Array, "N r"], H: Float[Array, "N r"], rows: int, columns: int) -> Float[Array, "rows columns"]:
    """Return the top-left block of `W(G, H)` of shape (rows, columns). At least one of the two sizes is N.

    By the displacement equation, column k + 1 of W is column k, cyclically shifted down by one place, minus `2 G` times
    row k of `J H`. Similarly, row a is obtained from row a - 1: subtract `2 G_a (J H)^T`, shift the result by one
    place, and change the sign of the entry that wraps around. So all columns follow from the first column, and all rows
    from the first row. The shorter of the two recurrences is used.
    """
    N = G.shape[0]
    unit = jnp.zeros(N, G.dtype).at[0].set(1)
    if rows == N:
        return _rolling_sums(_product(unit, G, H), -2 * jnp.flip(H, axis=0)[: columns - 1], G, 1).T
    H_turned = jnp.concatenate([H[:1], -jnp.flip(H[1:], axis=0)])
    return _rolling_sums(_transposed_product(unit, G, H), 2 * G[1:rows], H_turned, -1)


def _rolling_sums(
    first: Float[Array, " N"], left: Float[Array, "k-1 r"], right: Float[Array, "N r"], sign: int
) -> Float[Array, "k N"]:
    """Return the k rows of the recurrence `a_0 = first`, `a_{i+1} = turn(a_i) + left_i @ right^T`.

    `turn` shifts a row by one place to the right. The last entry becomes the first one and is multiplied by `sign`.
    """
    terms = jnp.concatenate([first[None], jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)])
    return _turned_rows(_running_sums(_turned_back_rows(terms, sign)), sign)


def _running_sums(rows: Float[Array, "k N"]) -> Float[Array, "k N"]:
    """Return the cumulative sums over rows: row i of the result is the sum of rows 0 to i.

    The k rows are summed by two matrix products: within blocks of about `sqrt(k)` rows, and over the blocks.
    `jnp.cumsum` takes twice as long on a CPU, and a loop would launch one kernel for each row on an accelerator.
    """
    k, N = rows.shape
    size = math.isqrt(k - 1) + 1
    blocks = jnp.pad(rows, ((0, -k % size), (0, 0))).reshape(-1, size, N)
    within = jnp.einsum("ij,bjn->bin", jnp.tri(size, dtype=rows.dtype), blocks, precision=jax.lax.Precision.HIGHEST)
    before = jnp.tri(len(blocks), k=-1, dtype=rows.dtype)
    offsets = jnp.matmul(before, within[:, -1], precision=jax.lax.Precision.HIGHEST)
    return (within + offsets[:, None]).reshape(-1, N)[:k]


def _turned_back_rows(rows: Float[Array, "k N"], sign: int) -> Float[Array, "k N"]:
    """Return the k rows with row i shifted to the left by i places, for k <= N.

    An entry that wraps around is multiplied by `sign`. The shifts are done by padding and reshaping. Indexing would be
    a gather, whose gradient is a slow scatter.
    """
    k, N = rows.shape
    wide = jnp.concatenate([rows, sign * rows[:, : k - 1]], axis=1).reshape(-1)
    return jnp.pad(wide, (0, k)).reshape(k, N + k)[:, :N]


def _turned_rows(rows: Float[Array, "k N"], sign: int) -> Float[Array, "k N"]:
    """Return the k rows with row i shifted to the right by i places, for k <= N.

    An entry that wraps around is multiplied by `sign`. This is both the inverse and the transpose of
    `_turned_back_rows`.
    """
    k, N = rows.shape
    wide = jnp.pad(rows, ((0, 0), (0, k))).reshape(-1)[:-k].reshape(k, N + k - 1)
    return wide[:, :N] + jnp.pad(sign * wide[:, N:], ((0, 0), (0, N - k + 1)))


@functools.partial(jax.jit, static_argnames="rank")
def _from_displacement(dense: Float[Array, "in out"], rank: int) -> LowDisplacementRank:
    """Return the matrix whose displacement is the truncated SVD, with `rank` terms, of the displacement of `dense`."""
    W = _completed(dense)
    displacement = jnp.roll(W, 1, axis=0) - jnp.concatenate([W[:, 1:], -W[:, :1]], axis=1)
    U, S, Vt = jnp.linalg.svd(displacement / 2)
    largest = jnp.where(S[0] > 0, S[0], 1)
    # If a singular value is only rounding error, its column of G is about zero. Its column of H gets the norm of the
    # first column, so that the gradient of the column of G is not zero.
    empty = S.size * jnp.finfo(S.dtype).eps * largest >= S
    norms = jnp.sqrt(jnp.where(empty, largest, S))[None, :rank]
    G, JH = U[:, :rank] * (S[None, :rank] / norms), Vt[:rank].T * norms
    m, n = dense.shape
    return LowDisplacementRank(G=G, H=jnp.flip(JH, axis=0), shape=(m, n))


def _completed(dense: Float[Array, "in out"]) -> Float[Array, "N N"]:
    """Return a square matrix W such that `dense` is the top-left block of `W^T`.

    The other entries of `W^T` continue the diagonals of `dense`, and wrap around at the border, with a change of sign
    if m > n. So at most m columns of the displacement of W are not zero, or at most n rows if m > n. Hence the rank of
    the displacement is at most min(m, n), and a Toeplitz `dense` gives a Toeplitz W.
    """
    m, n = dense.shape
    if m <= n:
        last, missing = dense[-1], jnp.arange(1, n - m + 1)[:, None]
        return jnp.concatenate([dense, last[(jnp.arange(n)[None] - missing) % n]]).T
    last, missing = dense[:, -1], jnp.arange(1, m - n + 1)[:, None]
    place = jnp.arange(m)[None] - missing
    return jnp.concatenate([dense.T, jnp.where(place < 0, -last[place % m], last[place % m])])


@functools.partial(jax.jit, static_argnames="rank")
def _random(dense: Float[Array, "in out"], rank: int) -> LowDisplacementRank:
    """Return a matrix with random G and H. They are scaled so that its norm is about the norm of `dense`."""
    G, H = jax.random.normal(jax.random.key(0), (2, max(dense.shape), rank), dense.dtype)
    # With unscaled G and H, the entries of W have the variance r N.
    unit = _largest(dense)
    scale = jnp.sqrt(unit) * (jnp.mean(jnp.square(dense / unit)) / (rank * max(dense.shape))) ** 0.25
    m, n = dense.shape
    return LowDisplacementRank(G=scale * G, H=scale * H, shape=(m, n))


@jax.jit
def _nearer(one: LowDisplacementRank, other: LowDisplacementRank, dense: Float[Array, "in out"]) -> LowDisplacementRank:
    """Return that matrix, of two given ones and the best multiple of each, which is nearest to `dense`."""
    unit = _largest(dense)
    target = dense / unit
    points, distances = [], []
    for matrix in (one, other):
        M = matrix.to_dense() / unit
        size = jnp.sum(jnp.square(M))
        factor = jnp.sum(target * M) / jnp.where(size > 0, size, 1)
        points += [matrix, dataclasses.replace(matrix, G=factor * matrix.G)]
        distances += [jnp.linalg.norm(target - M), jnp.linalg.norm(target - factor * M)]
    nearest = jnp.argmin(jnp.stack(distances))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[nearest], *points)


def _largest(dense: Float[Array, "in out"]) -> Float[Array, ""]:
    """Return the largest absolute value of the entries, or 1 if all entries are zero.

    The squares of entries divided by it cannot overflow, and their sum cannot underflow.
    """
    largest = jnp.max(jnp.abs(dense))
    return jnp.where(largest > 0, largest, 1)
