"""Image data sets in memory: the digits of scikit-learn, and arrays in an .npz file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from surm_jax.data.images.checks import check_images, check_labels
from surm_jax.data.images.dataset import ArraySource, ImageDataset
from surm_jax.data.images.encoded_sets import load_encoded
from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import open_npz

# The digits that each embedded data set has as its classes, by the name of the data set.
EMBEDDED: Mapping[str, range] = {"digits": range(10), "digits_0to4": range(5), "digits_5to9": range(5, 10)}

_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_MOST_CLASSES = 1_000_000


def load_digits(name: str) -> ImageDataset:
    """Load the handwritten digits that scikit-learn contains, 1,797 grey images of 8 x 8 pixels.

    The data set `digits` has all ten classes. `digits_0to4` (to pretrain on) and `digits_5to9` (to adapt to) have five
    classes each, with labels counted from 0. All three share one fixed split, which keeps the shares of the classes and
    has a third of the images for testing. So a test image of one data set is never a training image of another.

    The original pixels 0..16 become uint8 by `round(255 * pixel / 16)`, so that the images are like all others.

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

    A file with the array `jpeg` holds encoded images instead (see `load_encoded`).

    Raises:
        UserError: The file or an array is missing or damaged, or an array has a wrong shape, dtype or value. The
            message names the array and, for a value, its index.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        near = [other.name for other in sorted(file.parent.glob("*.npz"))] if file.parent.is_dir() else []
        raise UserError(f"no data file {file.absolute()}{did_you_mean(file.name, near)}")
    with open_npz(file) as archive:
        if "jpeg" in archive.keys:
            return load_encoded(file)
        if missing := [key for key in _REQUIRED if key not in archive.keys]:
            raise UserError(
                f"{path} lacks {', '.join(missing)}: it holds {', '.join(sorted(archive.keys)) or 'nothing'}"
                f"{did_you_mean(missing[0], archive.keys)}"
            )
        arrays = {key: archive.read(key) for key in archive.keys if key in (*_REQUIRED, "classes")}
    # `pop` removes each array from the dict, so that its memory is released when a converted copy replaces it.
    images = {split: _images(path, f"{split}_images", arrays.pop(f"{split}_images")) for split in ("train", "test")}
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise UserError(
            f"{path}: train_images are {images['train'].shape[1:]} and test_images {images['test'].shape[1:]}; "
            "(height, width, channels) must agree"
        )
    for split in ("train", "test"):
        check_labels(f"{path}: {split}_labels", arrays[f"{split}_labels"], len(images[split]))
    classes = _class_names(path, arrays.get("classes"), arrays["train_labels"])
    train, test = (ArraySource(images[split], arrays[f"{split}_labels"]) for split in ("train", "test"))
    return ImageDataset(path, train, test, classes, images["train"].shape[1:], (file,))


def _images(path: str, key: str, images: np.ndarray) -> np.ndarray:
    """Check images, and return them as uint8 or float32."""
    if not len(images):
        raise UserError(f"{path}: {key} is empty")
    check_images(f"{path}: {key}", images)
    return images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)


def _class_names(path: str, classes: np.ndarray | None, train_labels: np.ndarray) -> tuple[str, ...]:
    """Return the names of the classes in the file, or "0", "1", ... up to the largest training label if it has none."""
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
