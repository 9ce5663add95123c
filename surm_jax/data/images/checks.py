"""Checks of images, labels and class names that come from a user."""

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from surm_jax.errors import UserError

_MOST = 1 + 1e-5
"""The largest absolute value of a pixel of a float image, with room for rounding."""


def check_image(image: np.ndarray) -> None:
    """Check that an array is one image, uint8 or float with finite pixels in [-1, 1].

    A float image without any negative pixel may be scaled to [0, 1] by mistake, so a warning says so.

    Raises:
        UserError: The array has another shape, dtype or range.
    """
    if np.ndim(image) != 3 or 0 in np.shape(image):
        raise UserError(
            f"an image has shape {np.shape(image)}, but must be a non-empty (height, width, channels)"
            + ("; add the channel with image[..., None]" if np.ndim(image) == 2 else "")
        )
    if _range("the image", image)[0] >= 0:
        warnings.warn(_UNIT.format("a float image has no negative pixel", "image"), stacklevel=3)


def check_images(name: str, images: np.ndarray) -> None:
    """Check that an array holds images, uint8 or floats in [-1, 1] with some negative pixel.

    Args:
        name: The name of the array in error messages.
        images: The array.

    Raises:
        UserError: The array has another shape, dtype or range. The message names the first wrong pixel.
    """
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise UserError(
            f"{name} has shape {images.shape}, but must be a non-empty (n, height, width, channels)"
            + ("; add the channel with images[..., None]" if images.ndim == 3 else "")
        )
    if len(images):
        lowest, highest = _range(name, images)
        if lowest >= 0:
            raise UserError(_UNIT.format(f"{name} lies in [{lowest:.3g}, {highest:.3g}]", "images"))


def check_labels(name: str, labels: np.ndarray, count: int) -> None:
    """Check that an array holds `count` labels, integers of at least 0.

    Raises:
        UserError: The array has another shape or dtype, or a label is negative. The message names its index.
    """
    if labels.shape != (count,):
        raise UserError(f"{name} has shape {labels.shape}, but its images need ({count},)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name} is {labels.dtype}, but labels must be integers counted from 0")
    if count and labels.min() < 0:
        index = labels.argmin()
        raise UserError(f"{name}[{index}] is {labels[index]}, but labels are counted from 0")


def check_classes(name: str, classes: Sequence[str]) -> None:
    """Check that the names of classes are different strings, at least two.

    Args:
        name: The name of the data set in error messages.
        classes: The names.

    Raises:
        UserError: There are fewer than two names, a name is no string or is empty, or a name comes twice.
    """
    for index, each in enumerate(classes):
        if not isinstance(each, str):
            raise UserError(f"{name}: the name of class {index} is {each!r}, but must be a string")
        if not each.strip():
            raise UserError(f"{name}: the name of class {index} is empty: give every class a name")
    twice = [each for each, count in Counter(classes).items() if count > 1]
    if twice:
        where = [index for index, each in enumerate(classes) if each == twice[0]]
        raise UserError(
            f"{name}: the classes {where[0]} and {where[1]} are both named {twice[0]!r}: give every class its own name"
        )
    if len(classes) < 2:
        raise UserError(f"{name} has {len(classes)} class(es) {tuple(classes)}, but a classifier needs two or more")


def check_range(name: str, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Check that labels are below the number of classes.

    Raises:
        UserError: A label is too large. The message names its index.
    """
    wrong = np.flatnonzero(labels >= len(classes))
    if wrong.size:
        raise UserError(
            f"{name}[{wrong[0]}] is {labels[wrong[0]]}, but labels must be 0 to {len(classes) - 1} "
            f"({len(classes)} classes)"
        )


def warn_of_empty(what: str, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Warn of classes without any example, for instance because labels are counted from 1."""
    counts = np.bincount(labels.astype(np.int64), minlength=len(classes))
    empty = [each for each, count in zip(classes, counts, strict=True) if not count]
    if empty:
        hint = "; are the labels counted from 1? They must be counted from 0" if counts[0] == 0 else ""
        shown = ", ".join(map(repr, empty[:5])) + (", and others" if len(empty) > 5 else "")
        warnings.warn(f"{what}: {len(empty)} of {len(classes)} classes have no example: {shown}{hint}", stacklevel=4)


_UNIT = (
    "{0}, but floating-point images are scaled to [-1, 1], and their black is -1: store pixels 0..255 as uint8, or"
    " 2 * {1} - 1 of {1} in [0, 1]"
)


def _range(name: str, images: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest pixel of float images, and (-1, 1) for uint8 images.

    Raises:
        UserError: The dtype is another one, or a pixel is not finite or outside [-1, 1].
    """
    if images.dtype == np.uint8:
        return -1, 1
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{name} is {images.dtype}, but must be uint8 (0..255) or floating point ([-1, 1])")
    lowest, highest = images.min(), images.max()
    # The comparison is False for NaN, so NaN is refused too.
    if not (lowest >= -_MOST and highest <= _MOST):
        wrong = ~(np.abs(images) <= _MOST)
        index = tuple(map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
        raise UserError(
            f"{name}[{', '.join(map(str, index))}] is {images[index]}, but floating-point images must be finite "
            "and already scaled to [-1, 1]; store pixels 0..255 as uint8"
        )
    return float(lowest), float(highest)
