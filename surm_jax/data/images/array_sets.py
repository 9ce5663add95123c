"""Image data sets that are held in memory: the digits of scikit-learn, and arrays in an .npz file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from surm_jax.data.images.dataset import ArraySource, ImageDataset
from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import open_npz

# The digits that each embedded data set has as its classes, by the name of the data set.
EMBEDDED: Mapping[str, range] = {"digits": range(10), "digits_0to4": range(5), "digits_5to9": range(5, 10)}

_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_MOST_CLASSES = 1_000_000


def load_digits(name: str) -> ImageDataset:
    """Load the handwritten digits that scikit-learn contains, 1,797 grey images of 8 x 8 pixels.

    The data set `digits` has all ten classes. `digits_0to4` (to pretrain on) and `digits_5to9` (to adapt to) have five
    classes each, with labels counted from 0. All three use the same fixed stratified split, with a third of the images
    for testing. It does not depend on the seed of a run, so a test image of one data set is never a training image of
    another.

    The original pixels 0..16 are converted to uint8 by `round(255 * pixel / 16)`, so that the images are treated like
    all others.

    Raises:
        UserError: `name` is not one of the three names.
    """
    if name not in EMBEDDED:
        raise UserError(f"no embedded data set {name!r}: there are {', '.join(EMBEDDED)}{did_you_mean(name, EMBEDDED)}")
    from sklearn import (
        datasets,
        model_selection,
    )  # The import takes a second, and other data sets do not need it.

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    parts = model_selection.train_test_split(
        np.arange(len(images)), test_size=1 / 3, stratify=digits.target, random_state=0
    )
    kept = EMBEDDED[name]
    train, test = (
        ArraySource(images[rows], digits.target[rows] - kept.start)
        for rows in (part[np.isin(digits.target[part], kept)] for part in parts)
    )
    return ImageDataset(name, train, test, tuple(map(str, kept)), (8, 8, 1))


def load_npz(path: str) -> ImageDataset:
    """Load an image data set from an .npz file, and check all its arrays.

    The file holds these arrays. Other arrays are ignored, and pickled objects are refused.

    - `train_images` and `test_images` have shape (n, height, width, channels), with the same height, width and channels
      in both. They are uint8 0..255, or floats already scaled to [-1, 1]. Floats without any negative value are
      refused, since they were probably scaled to [0, 1].
    - `train_labels` and `test_labels` have shape (n,) and hold integers counted from 0.
    - `classes`, which is optional, holds the names of the classes as strings. Without it, the names are "0", "1", ...
      up to the largest training label.

    Raises:
        UserError: The file or an array is missing or damaged, or an array has a wrong shape, dtype or value. The
            message names the array and, for a value, its index.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        near = [other.name for other in sorted(file.parent.glob("*.npz"))] if file.parent.is_dir() else []
        raise UserError(f"no data file {file.absolute()}{did_you_mean(file.name, near)}")
    with open_npz(file) as archive:
        if missing := [key for key in _REQUIRED if key not in archive.keys]:
            raise UserError(
                f"{path} lacks {', '.join(missing)}: it holds {', '.join(sorted(archive.keys)) or 'nothing'}"
                f"{did_you_mean(missing[0], archive.keys)}"
            )
        arrays = {key: archive.read(key) for key in archive.keys if key in (*_REQUIRED, "classes")}
    # `pop` removes each array from the dict, so that its memory is released when a converted copy replaces it.
    images = {
        split: _checked_images(path, f"{split}_images", arrays.pop(f"{split}_images")) for split in ("train", "test")
    }
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise UserError(
            f"{path}: train_images are {images['train'].shape[1:]} and test_images {images['test'].shape[1:]}; "
            "(height, width, channels) must agree"
        )
    labels = {
        split: _checked_labels(path, f"{split}_labels", arrays[f"{split}_labels"], len(images[split]))
        for split in ("train", "test")
    }
    classes = _class_names(path, arrays.get("classes"), labels["train"])
    for split, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(classes)))
        if wrong.size:
            raise UserError(
                f"{path}: {split}_labels[{wrong[0]}] is {values[wrong[0]]}, but labels must be 0 to {len(classes) - 1} "
                f"({len(classes)} classes, {'named in classes' if 'classes' in arrays else 'counted in train_labels'})"
            )
    train, test = (ArraySource(images[split], labels[split]) for split in ("train", "test"))
    return ImageDataset(path, train, test, classes, images["train"].shape[1:], (file,))


def _checked_images(path: str, key: str, images: np.ndarray) -> np.ndarray:
    """Return images as uint8 or float32, after checking their shape, dtype and values."""
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(
            f"{path}: {key} has shape {images.shape}, but must be a non-empty (n, height, width, channels)"
            + ("; add the channel with images[..., None]" if images.ndim == 3 else "")
        )
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{path}: {key} is {images.dtype}, but must be uint8 (0..255) or floating point ([-1, 1])")
    lowest, highest, most = images.min(), images.max(), 1 + 1e-5
    # The comparison is False for NaN, so NaN is refused too.
    if not (lowest >= -most and highest <= most):
        wrong = ~(np.abs(images) <= most)
        index = tuple(map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
        raise UserError(
            f"{path}: {key}[{', '.join(map(str, index))}] is {images[index]}, but floating-point images must be finite "
            "and already scaled to [-1, 1]; store pixels 0..255 as uint8"
        )
    if lowest >= 0:
        raise UserError(
            f"{path}: {key} lies in [{lowest:.3g}, {highest:.3g}], but floating-point images are scaled to [-1, 1], "
            "and their black is -1: store pixels 0..255 as uint8, or 2 * images - 1 of images in [0, 1]"
        )
    return images.astype(np.float32, copy=False)


def _checked_labels(path: str, key: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Return labels as int64, after checking their shape and dtype.

    `load_npz` checks their range later, when the classes are known.
    """
    if labels.shape != (count,):
        raise UserError(f"{path}: {key} has shape {labels.shape}, but its images need ({count},)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: {key} is {labels.dtype}, but labels must be integers counted from 0")
    return labels.astype(np.int64)


def _class_names(path: str, classes: np.ndarray | None, train_labels: np.ndarray) -> tuple[str, ...]:
    """Return the names of the classes in the file. The default is "0", "1", ... up to the largest training label."""
    if classes is None:
        if (largest := train_labels.max()) >= _MOST_CLASSES:
            where = f"{path}: train_labels[{train_labels.argmax()}] is {largest}"
            raise UserError(f"{where}, but labels are counted from 0 and must be below {_MOST_CLASSES:,}")
        return tuple(map(str, range(int(largest) + 1)))
    if classes.ndim != 1 or classes.dtype.kind != "U" or not classes.size:
        raise UserError(
            f"{path}: classes has dtype {classes.dtype} and shape {classes.shape}, but must be a list of strings"
        )
    try:
        return tuple(map(str, classes))
    except (ValueError, SystemError) as error:  # The array holds code points that are not characters.
        raise UserError(f"{path}: classes holds strings that are not text ({error})") from None
