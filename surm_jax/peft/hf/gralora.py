"""The file format of GraLoRA adapters (grids of blocks of low rank) in peft."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surm_jax.errors import UserError
from surm_jax.peft.hf.format import Arrays, Format, LayerUpdate, Shapes, tidy
from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.methods.matrices.block_low_rank import GraLoRA
from surm_jax.peft.methods.update import Update
from surm_jax.structured import BlockLowRank, StructuredMatrix


class GraLoRAFormat(Format):
    """The file format of GraLoRA, which stores two arrays for each layer.

    Let N be `gralora_k`, and q = r / N the rank of a block. The update in peft is `alpha / r` times the transpose of
    our `BlockLowRank`. `gralora_A` has the shape (N, in / N, r). Its entry `gralora_A[k]` holds `down[k, b]` in the q
    columns from column b q on. `gralora_B` has the shape (N, r, out / N). Its entry `gralora_B[b]` holds `up[k, b]` in
    the q rows from row k q on. The settings are the same for all layers, so if the factors of layers differ, they are
    multiplied into `gralora_B`.
    """

    peft_type = "GRALORA"
    settings = frozenset({"r", "alpha", "gralora_k", "gralora_dropout"})
    mark = "gralora_"
    description = "a grid of blocks of low rank"

    def holds(self, matrix: StructuredMatrix) -> bool:
        """Return whether the format of peft's GraLoRA can store a matrix: whether it is a `BlockLowRank`."""
        return isinstance(matrix, BlockLowRank)

    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings and the tensors that store the updates of all modules.

        Raises:
            UserError: If the updates differ in their ranks or in their numbers of blocks.
        """
        first, *others = updates.values()
        rank, blocks = first.matrix.rank, first.matrix.blocks
        for other in others:
            if (other.matrix.rank, other.matrix.blocks) != (rank, blocks):
                raise UserError(
                    f"peft's GraLoRA has one rank and one number of blocks for all layers, but {first.path} has rank"
                    f" {rank} in {blocks} blocks, and {other.path} rank {other.matrix.rank} in {other.matrix.blocks}"
                )
        arrays = {}
        for module, update in updates.items():
            down, up = np.asarray(update.matrix.down), np.asarray(update.matrix.up)
            up = up * np.float32(update.factor / first.factor)
            arrays[module] = {
                "gralora_A": down.transpose(0, 2, 1, 3).reshape(blocks, -1, rank),
                "gralora_B": up.swapaxes(0, 1).reshape(blocks, rank, -1),
            }
        return {"r": rank, "gralora_k": blocks, "alpha": tidy(first.factor * rank), "bias": "none"}, arrays

    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Return a `GraLoRA` method with the settings of the folder, and the shapes of the two tensors.

        Raises:
            UserError: If a setting has a value that is not allowed, or does not fit the layer's kernel.
        """
        rank = int(settings.of_module("r", 32, "rank_pattern", module, whole=True))
        blocks = int(settings.of_module("gralora_k", 2, "rank_pattern", module, whole=True))
        update = GraLoRA(rank=rank, blocks=blocks, alpha=settings.of_module("alpha", 64, "alpha_pattern", module))
        try:
            jax.eval_shape(lambda: update.init(jax.random.key(0), shape))
        except UserError as error:
            raise UserError(f"{settings.path} describes an impossible update of {module}: {error}") from None
        m, n = shape
        return update, {"gralora_A": (blocks, m // blocks, rank), "gralora_B": (blocks, rank, n // blocks)}

    def read(self, arrays: Arrays) -> BlockLowRank:
        """Return the grid of blocks that the tensors of a layer hold."""
        A, B = arrays["gralora_A"], arrays["gralora_B"]
        N = len(A)
        down = A.reshape(N, A.shape[1], N, -1).swapaxes(1, 2)
        up = B.reshape(N, N, -1, B.shape[2]).swapaxes(0, 1)
        return BlockLowRank(down=jnp.asarray(down), up=jnp.asarray(up))
