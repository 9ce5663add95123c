"""Image classification sets in the layout of TensorFlow Datasets, read without TensorFlow and without the network.

Pillow decodes the images here, so pixels do not depend on whether OpenCV is installed.
"""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from surm_jax.data.corrupt import CorruptExampleError
from surm_jax.data.images.array_sets import EMBEDDED
from surm_jax.data.images.dataset import ImageDataset
from surm_jax.data.prepared import PreparedSet, Records, open_prepared
from surm_jax.errors import UserError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Number of records that are read at once to get their labels.
_CHUNK = 1000


@dataclass(frozen=True)
class TfdsSource:
    """An `ImageSource` over the encoded records of one split.

    Attributes:
        records: Random-access records with encoded bytes under "image" and a number under "label".
        channels: Number of channels to decode to: 1, 3 or 4.
        num_classes: Number of classes; labels must be below it.
        name: The name of this split in error messages.

    Raises:
        CorruptExampleError: On reading, if a record cannot be decoded or has no label; the message names it.
    """

    records: Records
    channels: int
    num_classes: int
    name: str

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """The labels of all examples. The images are not decoded; 50,000 records take a second."""
        labels: list[int] = []
        for start in range(0, len(self), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(self)))
            try:
                records: Iterable[dict[str, Any]] = self.records.__getitems__(indices)
            except RuntimeError:
                records = map(self._record, indices)  # One by one, to find the damaged one.
            labels += map(self._label, indices, records)
        return np.array(labels)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        label = self._label(index, record)
        try:
            image = np.asarray(Image.open(io.BytesIO(record["image"])).convert(_MODES[self.channels]))
        except Exception as error:
            # Pillow's errors have no common class: SyntaxError for a broken PNG, its own for a decompression bomb.
            raise CorruptExampleError(
                f"{self.name}: the image of example {index} cannot be decoded ({error})"
            ) from error
        return {"image": image[..., None] if image.ndim == 2 else image, "label": label}

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self.records[index]
        except RuntimeError as error:  # From the C++ reader, which opens a file only when it is read.
            raise CorruptExampleError(
                f"{self.name}: example {index} cannot be read, its file is damaged ({error})"
            ) from error

    def _label(self, index: int, record: dict[str, Any]) -> int:
        label = int(record["label"])
        if not 0 <= label < self.num_classes:
            raise CorruptExampleError(
                f"{self.name}: example {index} has label {label}, outside 0 to {self.num_classes - 1}"
            )
        return label


def load_tfds(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Open a prepared TFDS set. This takes milliseconds after the import of tensorflow_datasets (half a second).

    Args:
        name: `cifar10`, `cifar10:3.0.2`, `name/config` or `name/config:version`; without a version the newest.
        data_dir: The folder of prepared sets; `None` means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.

    Raises:
        UserError: The name is unknown, the set is not prepared in `data_dir` (the message says how to prepare it;
            nothing is ever downloaded), its files are missing or damaged, or it is not an image classification set
            with train and test splits.
    """
    prepared = open_prepared(name, data_dir, EMBEDDED)
    import tensorflow_datasets as tfds  # Imported here: other data sets do not need it.

    image, label = _features(prepared, tfds)
    channels = image.shape[-1] or 3
    train, test = (
        TfdsSource(
            prepared.records(split, {"image": tfds.decode.SkipDecoding()}),
            channels,
            label.num_classes,
            f"{name}, split {split}",
        )
        for split in _splits(prepared)
    )
    return ImageDataset(prepared.full_name, train, test, tuple(label.names), (*image.shape[:2], channels))


def _features(prepared: PreparedSet, tfds: Any) -> tuple[Any, Any]:
    """Return the image feature and the label feature."""
    image, label = (prepared.features.get(key) for key in ("image", "label"))
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or image.np_dtype != np.uint8
        or (image.shape[-1] or 3) not in _MODES
    ):
        has = ", ".join(f"{key} ({type(value).__name__})" for key, value in prepared.features.items())
        raise UserError(
            f"data set {prepared.name!r} is not an image classification set: it needs a uint8 'image' of 1, 3 or 4 "
            f"channels and a class 'label', but its features are {has}"
        )
    return image, label


def _splits(prepared: PreparedSet) -> tuple[str, str]:
    """Return the names of the training split and the test split."""
    test = next((split for split in ("test", "validation") if split in prepared.splits), None)
    if "train" not in prepared.splits or test is None:
        raise UserError(
            f"data set {prepared.name!r} has the splits {', '.join(prepared.splits)}; it needs 'train', and 'test' or "
            "'validation'"
        )
    return "train", test
