"""Resizing of learned position embeddings to another image size, bilinear or bicubic as in their source."""

import math
from collections.abc import Callable

import numpy as np

from surm_jax.errors import UserError

# The largest growth of a grid: a configuration from an untrusted file may ask for any size.
_MOST_GROWTH = 16


def resize_position_embed(
    position_embed: np.ndarray, shape: tuple[int, ...], *, extra_tokens: int | None = None
) -> np.ndarray:
    """Return position embeddings for another grid of patches: bilinear, corners aligned, computed in float64.

    This is for AugReg checkpoints and gives the numbers of `scipy.ndimage.zoom(grid, order=1)`, which their source
    calls (https://github.com/google-research/vision_transformer/blob/main/vit_jax/checkpoint.py): new patch `i` of `n`
    reads the old grid of side `m` at `i (m - 1) / (n - 1)`. Without `extra_tokens`, a length that is a square plus one
    means that the first row belongs to the class token; the row is copied, or dropped if the model has no class token.
    If the lengths agree, nothing changes.

    Args:
        position_embed: `(1, tokens, width)`. Half precision becomes float32 when it is resized.
        shape: The shape in the model, `(1, tokens', width)`.
        extra_tokens: As in `resize_position_embed_bicubic`; `None` infers from the lengths whether there is a class
            token.

    Raises:
        UserError: A length does not fit a square grid, or only the model has a class token.

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
    """Return position embeddings for another grid of patches: bicubic, computed in float64.

    This is for checkpoints of Hugging Face transformers, whose `interpolate_pos_encoding` calls PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`: new patch `i` of `n` reads the old grid of side `m` at
    `(i + 1/2) m / n - 1/2` by cubic convolution with `a = -3/4` (Keys, https://doi.org/10.1109/TASSP.1981.1163711),
    without antialiasing. Beyond the border the outermost patch is repeated. If the lengths agree, nothing changes.

    Args:
        position_embed: `(1, tokens, width)`. Half precision becomes float32 when it is resized.
        shape: The shape in the model, `(1, tokens', width)`.
        extra_tokens: The number of rows before the patches, such as the class token's, in the checkpoint and in the
            model. They are copied.

    Raises:
        UserError: A length minus `extra_tokens` is not a square.

    >>> resize_position_embed_bicubic(np.array([[[0.0], [0.0], [8.0], [8.0]]]), (1, 9, 1), extra_tokens=0)[0, ::3, 0]
    array([-0.69444444,  4.        ,  8.69444444])
    """
    if _fits(position_embed, shape):
        return position_embed
    return _resize_patches(position_embed, shape, extra_tokens, _bicubic)


def _fits(position_embed: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether there is nothing to resize. Arrays of other dimensions count too: `fill` reports their shape."""
    return position_embed.ndim != 3 or position_embed.shape[0] != 1 or position_embed.shape[1] == shape[1]


def _resize_patches(
    position_embed: np.ndarray, shape: tuple[int, ...], extra_tokens: int, kernel: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """Return position embeddings with the same extra tokens before another square grid."""
    old, new = (_side(tokens, extra_tokens) for tokens in (position_embed.shape[1], shape[1]))
    grid = _resize(position_embed[:, extra_tokens:], old, new, kernel)
    return np.concatenate([position_embed[:, :extra_tokens], grid], axis=1)


def _side(tokens: int, extra_tokens: int) -> int:
    """Return the side of the square grid of the tokens after the extra ones."""
    side = math.isqrt(max(0, tokens - extra_tokens))
    if side == 0 or side**2 != tokens - extra_tokens:
        raise UserError(
            f"{tokens} position embeddings are not a square grid plus {extra_tokens} others: "
            "does the model have the class token of the checkpoint?"
        )
    return side


def _layout(tokens: int) -> tuple[int, int]:
    """Return the number of class tokens (0 or 1) and the side of the square grid of the other tokens."""
    for class_tokens in (0, 1):
        side = math.isqrt(max(0, tokens - class_tokens))
        if side > 0 and side**2 == tokens - class_tokens:
            return class_tokens, side
    raise UserError(f"{tokens} position embeddings are not a square grid, with or without a class token")


def _resize(patches: np.ndarray, old: int, new: int, kernel: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Resize `(1, old^2, width)` to `(1, new^2, width)`, with the same kernel along both sides of the grid."""
    if new > _MOST_GROWTH * old:
        raise UserError(f"a grid of {old} x {old} position embeddings would grow to {new} x {new}: are both right?")
    weights = kernel(old, new)
    grid = patches[0].reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid.astype(np.float64), optimize=True)
    return grid.reshape(1, new * new, -1).astype(np.promote_types(patches.dtype, np.float32))


def _bilinear(old: int, new: int) -> np.ndarray:
    """Return the `(new, old)` matrix of linear interpolation from `old` to `new` points between the same ends."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :]))


def _bicubic(old: int, new: int) -> np.ndarray:
    """Return the `(new, old)` matrix of cubic convolution, with the points at the centres of cells."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        point = np.floor(at).astype(int) + step
        x = np.abs(at - point)
        near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(new), point.clip(0, old - 1)), np.where(x <= 1, near, far))
    return weights
