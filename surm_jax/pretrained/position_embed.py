"""Resizing learned position embeddings to another image size, as vision_transformer and big_vision do."""

import math

import numpy as np

from surm_jax.errors import UserError


def resize_position_embed(position_embed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns position embeddings for another grid of patches: bilinear, corners aligned, in float64, cast back.

    The same numbers as `scipy.ndimage.zoom(grid, order=1)`, which the sources call
    (https://github.com/google-research/vision_transformer/blob/main/vit_jax/checkpoint.py): patch `i` of `n` new ones
    reads the old grid at `i (m - 1) / (n - 1)`. A row for the class token, the first one where the length is a square
    plus one, is copied untouched, or dropped where the model has no class token. Nothing is done where the lengths
    agree.

    Args:
        position_embed: `(1, tokens, width)`.
        shape: what the model wants, `(1, tokens', width)`.

    Raises:
        UserError: a length that is neither a square nor a square plus one, or a class token that only the model has.

    >>> resize_position_embed(np.array([[[7.0], [0.0], [1.0], [2.0], [3.0]]]), (1, 10, 1))[0, :, 0].tolist()
    [7.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0]
    """
    if position_embed.ndim != 3 or position_embed.shape[1] == shape[1]:
        return position_embed  # what does not fit is reported with all other shapes
    old_class, old = _layout(position_embed.shape[1])
    new_class, new = _layout(shape[1])
    if new_class and not old_class:
        raise UserError(
            f"the {position_embed.shape[1]} position embeddings hold no class token, but the model's {shape[1]} do: "
            "use pool='mean'"
        )
    grid = position_embed[0, old_class:].reshape(old, old, -1)
    weights = _bilinear(old, new)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid, optimize=True).reshape(1, new * new, -1)
    return np.concatenate([position_embed[:, :new_class], grid.astype(position_embed.dtype)], axis=1)


def _layout(tokens: int) -> tuple[int, int]:
    """Returns the number of class tokens (0 or 1) and the side of the square grid of the others."""
    for class_tokens in (0, 1):
        side = math.isqrt(max(0, tokens - class_tokens))
        if side > 0 and side**2 == tokens - class_tokens:
            return class_tokens, side
    raise UserError(f"{tokens} position embeddings are not a square grid, with or without a class token")


def _bilinear(old: int, new: int) -> np.ndarray:
    """Returns the `(new, old)` matrix that interpolates `old` points on a line linearly at `new` ones, ends on ends."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None, :]))
