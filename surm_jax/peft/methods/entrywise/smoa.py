"""SMoA: modulation of blocks of the kernel, whose rows and columns are chosen by its singular values."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.base import AdapterConstant
from surm_jax.peft.parts.entrywise import ModulatedPart
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import LowRank, Placed, StructuredMatrix, Sum


class SpectralPart(ModulatedPart):
    """An update `W * M`, where M is block-diagonal after the rows and columns of the kernel W are sorted.

    Each row and column has a score: the mean index of the singular values, weighted by the energy that each of them
    has in this row or column. The arrays `row_places` and `column_places` hold the places of all rows and columns in
    the sorted order. They are stored, because the order of near ties may differ between machines.

    Args:
        matrix: The block-diagonal matrix.
        kernel: The layer's kernel W.
        **settings: The settings of `UpdatePart`.
    """

    formula = "W * sorted {}"

    def __init__(self, matrix: StructuredMatrix, kernel: Float[Array, "in out"], **settings: Any) -> None:
        super().__init__(matrix, kernel, **settings)
        U, S, Vt = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        # Numbers of rows are exact in float32, in which all arrays of an adapter are.
        self.row_places = AdapterConstant(_places(U, S))
        self.column_places = AdapterConstant(_places(Vt.T, S))

    def entries(self, matrix: Float[Array, "in out"], kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return the entrywise product of the kernel and M in the order of the kernel."""
        rows, columns = (places[...].astype(jnp.int32) for places in (self.row_places, self.column_places))
        return kernel * matrix[rows][:, columns]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SMoA(Update):
    """Low-rank modulation of blocks of the kernel W, `alpha / rank * W * (down_k @ up_k)` (SMoA, arXiv 2605.21147).

    The rows and the columns of W are sorted by the singular values of W that they belong to, and cut into K aligned
    blocks. Block k of the rows and block k of the columns have the product `down_k @ up_k`, and all other entries of W
    stay as they are. The ranks of the blocks sum to `rank`, so there are about `rank (in + out) / K` parameters. All
    `up_k` start at 0, and `down_k` at `N(0, K / in_features)`; the released code (misonsky/SMoA) draws them uniformly,
    with a third of this variance.

    >>> SMoA().init(jax.random.key(0), (768, 768)).num_params
    6144

    Attributes:
        rank: The sum of the ranks of all blocks. alpha is divided by it.
        blocks: The number K of blocks.
    """

    name: ClassVar[str] = "smoa"
    part: ClassVar[type[UpdatePart]] = SpectralPart
    takes_packed: ClassVar[bool] = False  # The rows of several kernels would be sorted together.
    rank: int = 8
    blocks: int = 2
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < self.blocks:
            raise UserError(
                f"smoa.rank={self.rank} must be at least smoa.blocks={self.blocks}: no block can have rank 0"
            )

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor of SMoA, `1 / rank`."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Return the initial block-diagonal matrix. It is zero, but the gradient of its arrays is not."""
        if self.blocks > min(shape):
            raise UserError(f"smoa.blocks={self.blocks} must be at most {min(shape)} for a kernel of {shape}")
        rows, columns, ranks = (_cut(size, self.blocks) for size in (*shape, self.rank))
        terms, row, column = [], 0, 0
        for k, (m, n, rank) in enumerate(zip(rows, columns, ranks, strict=True)):
            block = LowRank.init(jax.random.fold_in(key, k), (m, n), rank=rank, scale=m**-0.5)
            terms.append(Placed(block, shape, (row, column)))
            row, column = row + m, column + n
        return Sum(tuple(terms)) if len(terms) > 1 else terms[0]


def _cut(size: int, blocks: int) -> list[int]:
    """Divide a size into blocks of equal sizes. If they cannot be equal, the first ones are larger by 1."""
    return [len(block) for block in np.array_split(np.arange(size), blocks)]


def _places(vectors: Float[Array, "size k"], values: Float[Array, " k"]) -> Float[Array, " size"]:
    """Return how many rows have a lower score than each row. The class `SpectralPart` defines the scores.

    Args:
        vectors: The matrix of singular vectors, with a row for each row (or column) of the kernel.
        values: The singular values.
    """
    energy = (vectors * values[None]) ** 2
    index = jnp.arange(len(values), dtype=energy.dtype)
    score = jnp.sum(energy * index[None], axis=1) / jnp.maximum(jnp.sum(energy, axis=1), jnp.finfo(energy.dtype).eps)
    return jnp.argsort(jnp.argsort(score)).astype(jnp.float32)
