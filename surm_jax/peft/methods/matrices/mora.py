"""MoRA: updates of high rank with one small square matrix."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.settings import one_of
from surm_jax.peft.methods.update import Update
from surm_jax.structured import COMPRESSIONS, DECOMPRESSIONS, Tiled, tiled_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRA(Update):
    """A trained square matrix between a fixed compression and a fixed decompression (MoRA, arXiv 2405.12130).

    The square matrix starts at 0, and has about as many parameters as LoRA at `rank`. By default, groups of features
    share a row and a column of this matrix, which the paper chooses for large ranks. With `compress="rotate"`, groups
    of features are rotated as in rotary position embeddings, which the paper chooses for small ranks. The types of the
    released code (kongds/MoRA) are, as compress and decompress: modulo and modulo (1), contiguous and contiguous (2),
    contiguous and modulo (3), modulo and contiguous (4), and rotate (6). In this example, the square matrix has the
    shape (39, 39):

    >>> MoRA(rank=1).init(jax.random.key(0), (768, 768)).num_params
    1521

    Attributes:
        rank: The rank of the LoRA that has about as many parameters.
        compress: How inputs become rows of the square matrix (`surm_jax.structured.Tiled`).
        decompress: How its products become outputs. It stays "modulo" if compress is "decouple" or "rotate".
        rounding: How the side of the square matrix is rounded: to the "nearest" number as in the released code, or
            "down" as in the paper.
    """

    name: ClassVar[str] = "mora"
    rank: int = 8
    compress: str = one_of("modulo", COMPRESSIONS)
    decompress: str = one_of("modulo", DECOMPRESSIONS)
    rounding: str = one_of("nearest", ("nearest", "down"))

    def init(self, key: jax.Array, shape: tuple[int, int]) -> Tiled:
        """Return an initial matrix of the given shape, which equals zero but has a non-zero gradient."""
        side = tiled_side(shape, self.rank, rotate=self.compress == "rotate", down=self.rounding == "down")
        return Tiled.init(key, shape, scale=1.0, side=side, compress=self.compress, decompress=self.decompress)
