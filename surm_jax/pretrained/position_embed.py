"""Resize the learned position embeddings of image patches to another image size.

The interpolation is bilinear for AugReg checkpoints and for our own format, and bicubic for transformers, as there.
"""

import math
from collections.abc import Callable

import numpy as np

from surm_jax.errors import UserError

# The side of a grid may grow by at most this factor, since the configuration in an untrusted file may give any size.
_MOST_GROWTH = 16


def resize_position_embed(
    position_embed: np.ndarray, shape: tuple[int, ...], *, extra_tokens: int | None = None
) -> np.ndarray:
    """Resize position embeddings to another square grid of patches by bilinear interpolation, and return them.

    This is for AugReg checkpoints. The result equals that of `scipy.ndimage.zoom(grid, order=1)`, which the code of
    AugReg calls (https://github.com/google-research/vision_transformer/blob/main/vit_jax/checkpoint.py). The corners of
    both grids are aligned: along each axis, index `i` of a new grid of side `n` reads the old grid of side `m` at `i (m
    - 1) / (n - 1)`. The computation is in float64.

    The rows before the patches, such as that of the class token, are copied. If the number of tokens does not change,
    the array is returned unchanged.

    Args:
        position_embed: An array of shape `(1, tokens, width)`. If it is resized, half precision becomes float32.
        shape: The shape of the parameter in the model, `(1, tokens', width)`.
        extra_tokens: The number of rows before the patches, in the checkpoint and in the model. With `None`, it is
            inferred for both: if the number of tokens is a square there is none, and if it is a square plus one, the
            first row belongs to the class token. That row is dropped if only the checkpoint has it.

    Raises:
        UserError: A number of tokens does not fit a square grid, only the model has a class token, or the side of the
            grid would grow by more than a factor of 16.

    In the example, the row of a class token (7) is copied, and a grid of 2 x 2 becomes one of 3 x 3:

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
    """Resize position embeddings to another square grid of patches by bicubic interpolation, and return them.

    This is for checkpoints of Hugging Face transformers, whose `interpolate_pos_encoding` calls PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`. Along each axis, index `i` of a new grid of side `n` reads the
    old grid of side `m` at `(i + 1/2) m / n - 1/2`. The interpolation is cubic convolution with `a = -3/4` (Keys,
    https://doi.org/10.1109/TASSP.1981.1163711), without antialiasing. Beyond the border, the outermost patch is
    repeated. The computation is in float64. If the number of tokens does not change, the array is returned unchanged.

    Args:
        position_embed: An array of shape `(1, tokens, width)`. If it is resized, half precision becomes float32.
        shape: The shape of the parameter in the model, `(1, tokens', width)`.
        extra_tokens: The number of rows before the patches, such as that of the class token, in the checkpoint and in
            the model. These rows are copied.

    Raises:
        UserError: A number of tokens minus `extra_tokens` is not a square, or the side of the grid would grow by more
            than a factor of 16.

    In the example, a grid of 2 x 2 becomes one of 3 x 3, whose first column is shown:

    >>> resize_position_embed_bicubic(np.array([[[0.0], [0.0], [8.0], [8.0]]]), (1, 9, 1), extra_tokens=0)[0, ::3, 0]
    array([-0.69444444,  4.        ,  8.69444444])
    """
    if _fits(position_embed, shape):
        return position_embed
    return _resize_patches(position_embed, shape, extra_tokens, _bicubic)


def _fits(position_embed: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether position embeddings need no resizing, because they have as many tokens as the model.

    It is also true for an array of a wrong shape, which `fill` reports later.
    """
    return position_embed.ndim != 3 or position_embed.shape[0] != 1 or position_embed.shape[1] == shape[1]


def _resize_patches(
    position_embed: np.ndarray, shape: tuple[int, ...], extra_tokens: int, kernel: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """Resize the grid of patches in position embeddings with an interpolation kernel, and return all of them.

    The first `extra_tokens` rows, which do not belong to patches, are copied.
    """
    old, new = (_side(tokens, extra_tokens) for tokens in (position_embed.shape[1], shape[1]))
    grid = _resize(position_embed[:, extra_tokens:], old, new, kernel)
    return np.concatenate([position_embed[:, :extra_tokens], grid], axis=1)


def _side(tokens: int, extra_tokens: int) -> int:
    """Return the side of the square grid of patches. All tokens but the first `extra_tokens` are patches."""
    side = math.isqrt(max(0, tokens - extra_tokens))
    if side == 0 or side**2 != tokens - extra_tokens:
        raise UserError(
            f"{tokens} position embeddings are not a square grid plus {extra_tokens} others: "
            "does the model have the class token of the checkpoint?"
        )
    return side


def _layout(tokens: int) -> tuple[int, int]:
    """Split a number of tokens into the number of class tokens (0 or 1) and the side of the square grid of patches."""
    for class_tokens in (0, 1):
        side = math.isqrt(max(0, tokens - class_tokens))
        if side > 0 and side**2 == tokens - class_tokens:
            return class_tokens, side
    raise UserError(f"{tokens} position embeddings are not a square grid, with or without a class token")


def _resize(patches: np.ndarray, old: int, new: int, kernel: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Resize the embeddings of a square grid of patches from shape `(1, old^2, width)` to `(1, new^2, width)`.

    The matrix `kernel(old, new)`, of shape `(new, old)`, interpolates along both axes of the grid.
    """
    if new > _MOST_GROWTH * old:
        raise UserError(f"a grid of {old} x {old} position embeddings would grow to {new} x {new}: are both right?")
    weights = kernel(old, new)
    grid = patches[0].reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid.astype(np.float64), optimize=True)
    return grid.reshape(1, new * new, -1).astype(np.promote_types(patches.dtype, np.float32))


def _bilinear(old: int, new: int) -> np.ndarray:
    """Return the `(new, old)` matrix that interpolates linearly from `old` to `new` points with the same end points."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :]))


def _bicubic(old: int, new: int) -> np.ndarray:
    """Return the `(new, old)` matrix that interpolates by cubic convolution from `old` to `new` points.

    An interval is divided into `old` and into `new` cells of equal width. The points are the centres of these cells.
    """
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        point = np.floor(at).astype(int) + step
        x = np.abs(at - point)
        near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(new), point.clip(0, old - 1)), np.where(x <= 1, near, far))
    return weights
