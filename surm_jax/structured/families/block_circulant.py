"""Block-circulant matrices, which are divided into square blocks that are circulant matrices.

A matrix of a single block is circulant, and with blocks of size 1 every matrix is block-circulant.

The paper (arXiv 2406.17740) writes `W x`. In its notation, block (q, p) of `W` is `Z_1(c[p, q])`, the circulant matrix
whose first column is `c[p, q]`. It maps block p of the input to block q of the output. Here `y = x @ M` with `M = W^T`,
and `c[p, q]` is the first ROW of block (p, q) of `M`.

A matrix may be rectangular, but the size of the blocks must divide both in_features and out_features. Nothing is
padded.
"""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from surm_jax.devices.batch import batch_local
from surm_jax.errors import UserError
from surm_jax.structured.base import checked_shape
from surm_jax.structured.families.base import Family, checked_dense, family
from surm_jax.structured.families.circulant import Circulant


@family
class BlockCirculant(Family):
    """Matrix of circulant b x b blocks, `M[p b + i, q b + j] = c[p, q, (j - i) mod b]`.

    The formula gives entry (i, j) of block (p, q). The matrix has in * out / b parameters. For each row of x, the
    product takes in / b real FFTs of length b and out / b inverse FFTs. For each of the b / 2 + 1 frequencies it also
    takes the product of a complex vector of length in / b and a complex matrix of shape (in / b, out / b). A matrix of
    a single block equals a `Circulant`. `M` is `W^T` in the notation of arXiv 2406.17740.

    The fine-tuning method C3A (arXiv 2407.19342) adds such a matrix to a kernel. The C3A layer in Hugging Face's peft
    has a weight `w` of shape (out / b, in / b, b) and adds `y[q b + i] = sum_{p, a} x[p b + a] w[q, p, (a - i) mod b] /
    in`. This is `x @ M` if

        c[p, q, k] = w[q, p, -k mod b] / in,        w[q, p, k] = in * c[p, q, -k mod b].

    Attributes:
        c: (in / b, out / b, b), the first rows of all blocks.

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
        """The shape `(in_features, out_features)` of `M`."""
        in_blocks, out_blocks, b = self.c.shape[-3:]
        return in_blocks * b, out_blocks * b

    @property
    def block(self) -> int:
        """The size b of the b x b blocks."""
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
        """Return the zero matrix, with which training starts.

        No array is random. `M` is linear in `c`, so the gradient of `c` is not zero at the start.

        Args:
            key: Not used.
            shape: `(in_features, out_features)`.
            scale: Not used.
            block: The size of the blocks, a divisor of in_features and out_features. The default is their greatest
                common divisor, which gives the fewest parameters.
            dtype: Dtype of `c`.

        Raises:
            UserError: The shape is not two positive integers, or the size of the blocks does not divide both of them.
        """
        m, n = checked_shape(cls.__name__, shape)
        b = _checked_block(block, (m, n))
        return cls(c=jnp.zeros((m // b, n // b, b), dtype))

    @classmethod
    def nearest(cls, dense: Float[Array, "in out"], *, block: int | None = None) -> Self:
        """Return the block-circulant matrix nearest to `dense` in the Frobenius norm.

        Each block of `dense` is replaced by its nearest circulant matrix (`Circulant.nearest`).

        Args:
            dense: The matrix to approximate, (in_features, out_features).
            block: The size of the blocks, as in `init`.

        Raises:
            UserError: `dense` is not a floating-point matrix, or the size of the blocks does not divide both dimensions
                of `dense`.
        """
        dense = checked_dense(cls.__name__, dense)
        m, n = dense.shape
        b = _checked_block(block, (m, n))
        blocks = dense.reshape(m // b, b, n // b, b).swapaxes(1, 2)
        return cls(c=jax.vmap(jax.vmap(lambda one: Circulant.nearest(one).c))(blocks))

    @classmethod
    def options_within(cls, shape: tuple[int, int], budget: int) -> dict[str, Any] | None:
        """Return the smallest size of the blocks within the budget of parameters, or None if every size exceeds it."""
        # Smaller blocks need more parameters.
        m, n = shape
        common = math.gcd(m, n)
        fitting = (b for b in range(1, common + 1) if common % b == 0 and m * n // b <= budget)
        return next(({"block": b} for b in fitting), None)

    @classmethod
    def typical_options(cls, shape: tuple[int, int]) -> tuple[dict[str, Any], ...]:
        """Return the options with which the benchmarks measure the speed of this family: blocks of size 128."""
        del shape
        return ({"block": 128},)

    @classmethod
    def example(cls) -> Self:
        """Return a small matrix with random parameters, the same in every call."""
        return cls.random((6, 9), block=3)

    @property
    def T(self) -> "BlockCirculant":
        """The transpose: blocks (p, q) and (q, p) are exchanged, and each block is transposed, `c[q, p, -k mod b]`."""
        return BlockCirculant(c=jnp.roll(jnp.flip(self.c, -1), 1, axis=-1).swapaxes(-3, -2))

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return _convolve_blocks(x, self.c)

    def _dense(self) -> Float[Array, "in out"]:
        # Two copies of the vector c of a block are concatenated, so row i of the block is a slice of the result. In
        # reverse mode, slices are far faster than indexing.
        b, twice = self.block, jnp.concatenate([self.c, self.c], axis=-1)
        rows = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(twice, b - i, b, axis=-1), out_axes=1)(jnp.arange(b))
        return rows.reshape(self.shape)

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        b = self.block
        shifted = -jnp.subtract.outer(ids % b, jnp.arange(b)) % b
        blocks = jnp.take_along_axis(self.c[ids // b], shifted[..., None, :], axis=-1)
        return blocks.reshape(*ids.shape, self.shape[1])


@batch_local
def _convolve_blocks(
    x: Float[Array, "*batch in"], c: Float[Array, "in_blocks out_blocks b"]
) -> Float[Array, "*batch out"]:
    in_blocks, out_blocks, b = c.shape
    batch = x.shape[:-1]
    spectra = jnp.fft.rfft(x.reshape(*batch, in_blocks, b))
    # By default, accelerators multiply in a lower precision, which would spoil the accuracy of the float32 FFTs.
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
