"""The file format of C3A adapters (grids of circulant blocks) in peft."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from surm_jax.errors import UserError
from surm_jax.peft.hf.format import Arrays, Format, LayerUpdate, Shapes, by_module
from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.methods.matrices.circulant import C3A
from surm_jax.peft.methods.update import Update
from surm_jax.structured import BlockCirculant, Circulant, CirculantPair, StructuredMatrix


class C3AFormat(Format):
    """The file format of C3A, which stores a grid of circulant blocks of size b x b for each layer.

    The tensor `c3a_kernel` of shape (out / b, in / b, b) holds the vectors `c` of our `BlockCirculant` in reversed
    order: `c3a_kernel[q, p, k] = factor * in * c[p, q, -k mod b]`, where p counts the blocks of the input and q those
    of the output. The multiplication by in (in_features) compensates for a division in peft. A square circulant is
    stored as a grid of one block. The format has no alpha, so the factor of an update is multiplied into the tensor.
    """

    peft_type = "C3A"
    settings = frozenset({"block_size", "block_size_pattern"})
    mark = "c3a_kernel"
    description = "blocks of circulants, or one square circulant"

    def holds(self, matrix: StructuredMatrix) -> bool:
        """Return whether a matrix is a grid of circulant blocks or one square circulant."""
        is_square = isinstance(matrix, Circulant | CirculantPair) and matrix.shape[0] == matrix.shape[1]
        return isinstance(matrix, BlockCirculant) or is_square

    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings of the peft folder, such as the block size of each module, and one tensor per module."""
        kernels = {}
        for module, update in updates.items():
            c = np.asarray(update.matrix.compact().c, np.float64)
            c = c.reshape(1, 1, -1) if c.ndim == 1 else c
            kernel = update.factor * update.matrix.shape[0] * _backwards(c.swapaxes(0, 1))
            kernels[module] = {"c3a_kernel": kernel.astype(np.float32)}
        blocks = {module: arrays["c3a_kernel"].shape[-1] for module, arrays in kernels.items()}
        return {**by_module("block_size", "block_size_pattern", blocks), "bias": "none"}, kernels

    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Return a `C3A` method with alpha = 1 and the block size in the settings, and the shape of `c3a_kernel`.

        Raises:
            UserError: If the block size is not a whole number of at least 1, or does not divide both dimensions of the
                layer's kernel.
        """
        block = int(settings.of_module("block_size", 256, "block_size_pattern", module, whole=True))
        if shape[0] % block or shape[1] % block:
            raise UserError(
                f"{settings.path} sets blocks of {block} for {module}, but {block} does not divide both sizes of"
                f" {shape[0]} x {shape[1]}"
            )
        return C3A(block=block), {"c3a_kernel": (shape[1] // block, shape[0] // block, block)}

    def read(self, arrays: Arrays) -> BlockCirculant:
        """Return the grid of circulant blocks that the tensor `c3a_kernel` of a layer holds."""
        return BlockCirculant(c=jnp.asarray(_backwards(arrays["c3a_kernel"]).swapaxes(0, 1)))


def _backwards(c: np.ndarray) -> np.ndarray:
    """Reverse the last axis of an array, so that entry k becomes entry -k mod b. The first entry stays in place."""
    return np.roll(np.flip(c, -1), 1, axis=-1)
