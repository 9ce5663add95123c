"""Grids of circulant blocks: from one circulant (a single block) to any dense matrix (blocks of size 1).

In the paper's notation (arXiv 2406.17740, `W x`) block (q, p) of `W` is `Z_1(c[p, q])`, which maps input block p
to output block q. Here `y = x @ M` with `M = W^T`, whose block (p, q) has `c[p, q]` as its first ROW.

Rectangular shapes: the block size must divide both sizes; nothing is padded.
"""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from surm_jax.devices.batch import batch_local
from surm_jax.errors import UserError
from surm_jax.structured.base import checked_shape
from surm_jax.structured.families.base import Family, checked_dense, family
from surm_jax.structured.families.circulant import Circulant


@family
class BlockCirculant(Family):
    """Grid of circulant b x b blocks, `M[p b + i, q b + j] = c[p, q, (j - i) mod b]`; the transpose of the paper's `W`.

    It has in * out / b numbers. A row of x costs in / b real FFTs of length b, out / b inverse ones, and a complex
    matrix product over the blocks for each of the b / 2 + 1 frequencies. With one block this is `Circulant`.

    It is the update of C3A (arXiv 2407.19342). The layer in Hugging Face's peft has a weight `w` of shape (out / b, in
    / b, b) and adds `y[q b + i] = sum_{p, a} x[p b + a] w[q, p, (a - i) mod b] / in`. Both matrices are equal if

        c[p, q, k] = w[q, p, -k mod b] / in,        w[q, p, k] = in * c[p, q, -k mod b].

    Attributes:
        c: (in / b, out / b, b): the first row of every block.

    >>> BlockCirculant(jnp.array([[[1.0, 2.0], [3.0, 4.0]]])).to_dense()
    Array([[1., 2., 3., 4.],
           [2., 1., 4., 3.]], dtype=float32)
    """

    option_names = ("block",)
    _title = "block-circulant"

    c: Float[Array, "in_blocks out_blocks b"]

    def __post_init__(self) -> None:
        if self.c is None:
            return
        self._check_dimensions(c="(in / b, out / b, b)")
        self._check_leaf("c", tuple(self.c.shape))

    @property
    def shape(self) -> tuple[int, int]:
        """`(in_features, out_features)`."""
        in_blocks, out_blocks, b = self.c.shape[-3:]
        return in_blocks * b, out_blocks * b

    @property
    def block(self) -> int:
        """The size b of the blocks."""
        return self.c.shape[-1]

    @classmethod
    def init(
        cls,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        *,
        scale: float,
        block: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """Return the zero matrix. `M` is linear in `c`, which can learn from zero: nothing is random.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            block: The size of the blocks, a divisor of both sizes of the matrix. The default is the largest common
                divisor, which needs the fewest numbers.
            dtype: Type of `c`.

        Raises:
            UserError: The shape is not two positive integers, or the block does not divide both.
        """
        m, n = checked_shape(cls.__name__, shape)
        b = _checked_block(block, (m, n))
        return cls(c=jnp.zeros((m // b, n // b, b), dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, block: int | None = None) -> Self:
        """Return the block-circulant matrix nearest to `dense`: each block is projected by `Circulant.nearest`.

        Args:
            dense: (in_features, out_features).
            block: As in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the block does not divide both of its sizes.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        b = _checked_block(block, (m, n))
        blocks = dense.reshape(m // b, b, n // b, b).swapaxes(1, 2)
        return cls(c=jax.vmap(jax.vmap(lambda one: Circulant.nearest(one).c))(blocks))

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the smallest block that stays within the budget."""
        # Smaller blocks hold more numbers.
        m, n = shape
        common = math.gcd(m, n)
        fitting = (b for b in range(1, common + 1) if common % b == 0 and m * n // b <= budget)
        return next(({"block": b} for b in fitting), None)

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options that benchmarks time."""
        del shape
        return ({"block": 128},)

    @classmethod
    def example(cls) -> Self:
        """Return a small random member, the same one in every call."""
        return cls.random((6, 9), block=3)

    @property
    def T(self) -> "BlockCirculant":
        """The transpose: the grid is transposed and every block is read backwards, `c[q, p, -k mod b]`."""
        return BlockCirculant(c=jnp.roll(jnp.flip(self.c, -1), 1, axis=-1).swapaxes(-3, -2))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return _convolve_blocks(x, self.c)

    def _dense(self) -> Float[Array, "in out"]:
        # Row i of a block is a slice of its c repeated twice. Slices are far faster in reverse mode than indexing.
        b, twice = self.block, jnp.concatenate([self.c, self.c], axis=-1)
        rows = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(twice, b - i, b, axis=-1), out_axes=1)(jnp.arange(b))
        return rows.reshape(self.shape)


@batch_local
def _convolve_blocks(
    x: Float[Array, "*batch in"], c: Float[Array, "in_blocks out_blocks b"]
) -> Float[Array, "*batch out"]:
    in_blocks, out_blocks, b = c.shape
    batch = x.shape[:-1]
    spectra = jnp.fft.rfft(x.reshape(*batch, in_blocks, b))
    # Accelerators multiply in a lower precision by default, which would spoil both transforms in float32.
    products = jnp.einsum("...pf,pqf->...qf", spectra, jnp.fft.rfft(c), precision=jax.lax.Precision.HIGHEST)
    return jnp.fft.irfft(products, n=b).reshape(*batch, out_blocks * b)


def _checked_block(block: int | None, shape: tuple[int, int]) -> int:
    m, n = shape
    largest = math.gcd(m, n)
    if block is None:
        return largest
    if not isinstance(block, int) or block < 1 or largest % block:
        divisors = ", ".join(str(b) for b in range(1, largest + 1) if largest % b == 0)
        raise UserError(
            f"BlockCirculant: blocks of {block!r} do not divide both sizes of {m} x {n}; possible are {divisors}"
        )
    return block
