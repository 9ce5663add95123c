"""Resizing learned position embeddings to another image size, each as its source does: bilinear or bicubic."""

import math
from collections.abc import Callable

import numpy as np

from surm_jax.errors import UserError

# The configuration of a stranger may name any size: more memory than the file has is not taken at its word.
_MOST_GROWTH = 16


def resize_position_embed(
    position_embed: np.ndarray, shape: tuple[int, ...], *, extra_tokens: int | None = None
) -> np.ndarray:
    """Returns position embeddings for another grid of patches: bilinear, corners aligned, calculated in float64.

    For AugReg checkpoints. The same numbers as `scipy.ndimage.zoom(grid, order=1)`, which the sources call
    (https://github.com/google-research/vision_transformer/blob/main/vit_jax/checkpoint.py): patch `i` of `n` new ones
    reads the old grid at `i (m - 1) / (n - 1)`. Without `extra_tokens` a row for the class token, the first one where
    the length is a square plus one, is copied untouched, or dropped where the model has no class token. Nothing is
    done where the lengths agree.

    Args:
        position_embed: `(1, tokens, width)`; what is resized of half precision is float32.
        shape: what the model wants, `(1, tokens', width)`.
        extra_tokens: as in `resize_position_embed_bicubic`.

    Raises:
        UserError: a length that is neither a square nor a square plus one, or not a square and the extra tokens; or a
            class token that only the model has.

    >>> resize_position_embed(np.array([[[7.0], [0.0], [1.0], [2.0], [3.0]]]), (1, 10, 1))[0, :, 0].tolist()
    [7.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0]
    """
    if _fits(position_embed, shape):
        return position_embed
    if extra_tokens is not None:
        return _resize_patches(position_embed, shape, extra_tokens, _bilinear)
    old_class, old = _layout(position_embed.shape[1])
    new_class, new = _layout(shape[1])
    if new_class and not old_class:
        raise UserError(
            f"the {position_embed.shape[1]} position embeddings hold no class token, but the model's {shape[1]} do: "
            "use pool='mean'"
        )
    grid = _resize(position_embed[:, old_class:], old, new, _bilinear)
    return np.concatenate([position_embed[:, :new_class], grid], axis=1)


def resize_position_embed_bicubic(
    position_embed: np.ndarray, shape: tuple[int, ...], *, extra_tokens: int
) -> np.ndarray:
    """Returns position embeddings for another grid of patches: bicubic, calculated in float64.

    For checkpoints of Hugging Face transformers, whose `interpolate_pos_encoding` calls PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`: patch `i` of `n` new ones reads the `m` old ones at
    `(i + 1/2) m / n - 1/2` by cubic convolution with `a = -3/4` (Keys, https://doi.org/10.1109/TASSP.1981.1163711),
    without antialiasing; beyond the border the outermost patch is repeated. Nothing is done where the lengths agree.

    Args:
        position_embed: `(1, tokens, width)`; what is resized of half precision is float32.
        shape: what the model wants, `(1, tokens', width)`.
        extra_tokens: rows before those of the patches, on both sides, such as the class token's; they are copied.

    Raises:
        UserError: without the extra tokens the length is not a square.

    >>> resize_position_embed_bicubic(np.array([[[0.0], [0.0], [8.0], [8.0]]]), (1, 9, 1), extra_tokens=0)[0, ::3, 0]
    array([-0.69444444,  4.        ,  8.69444444])
    """
    if _fits(position_embed, shape):
        return position_embed
    return _resize_patches(position_embed, shape, extra_tokens, _bicubic)


def _fits(position_embed: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Says whether there is nothing to resize. What has other dimensions is reported with all other shapes."""
    return position_embed.ndim != 3 or position_embed.shape[0] != 1 or position_embed.shape[1] == shape[1]


def _resize_patches(
    position_embed: np.ndarray, shape: tuple[int, ...], extra_tokens: int, kernel: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """Returns position embeddings with the same extra tokens before another square grid."""
    old, new = (_side(tokens, extra_tokens) for tokens in (position_embed.shape[1], shape[1]))
    grid = _resize(position_embed[:, extra_tokens:], old, new, kernel)
    return np.concatenate([position_embed[:, :extra_tokens], grid], axis=1)


def _side(tokens: int, extra_tokens: int) -> int:
    """Return the side of the square grid of the tokens after the extra ones."""
    side = math.isqrt(max(0, tokens - extra_tokens))
    if side == 0 or side**2 != tokens - extra_tokens:
        raise UserError(
            f"{tokens} position embeddings are not a square grid and {extra_tokens} more: "
            "does the model have the class token of the checkpoint?"
        )
    return side


def _layout(tokens: int) -> tuple[int, int]:
    """Returns the number of class tokens (0 or 1) and the side of the square grid of the others."""
    for class_tokens in (0, 1):
        side = math.isqrt(max(0, tokens - class_tokens))
        if side > 0 and side**2 == tokens - class_tokens:
            return class_tokens, side
    raise UserError(f"{tokens} position embeddings are not a square grid, with or without a class token")


def _resize(patches: np.ndarray, old: int, new: int, kernel: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Returns `(1, new^2, width)` of `(1, old^2, width)`, with the same kernel along both sides of the grid."""
    if new > _MOST_GROWTH * old:
        raise UserError(f"a grid of {old} x {old} position embeddings would grow to {new} x {new}: are both right?")
    weights = kernel(old, new)
    grid = patches[0].reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid.astype(np.float64), optimize=True)
    return grid.reshape(1, new * new, -1).astype(np.promote_types(patches.dtype, np.float32))


def _bilinear(old: int, new: int) -> np.ndarray:
    """Returns the `(new, old)` matrix that interpolates `old` points on a line linearly at `new` ones, ends on ends."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :]))


def _bicubic(old: int, new: int) -> np.ndarray:
    """Returns the `(new, old)` matrix of the cubic convolution, with half a cell before the first point of a line."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        point = np.floor(at).astype(int) + step
        x = np.abs(at - point)
        near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(new), point.clip(0, old - 1)), np.where(x <= 1, near, far))
    return weights
