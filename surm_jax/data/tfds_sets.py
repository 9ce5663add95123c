"""Load image classification data sets that TensorFlow Datasets has prepared, without TensorFlow or the network.

The images are always decoded by Pillow, so that the pixels do not depend on whether OpenCV is installed.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from surm_jax.data.corrupt import CorruptExampleError
from surm_jax.data.images.array_sets import EMBEDDED
from surm_jax.data.images.dataset import ImageDataset
from surm_jax.data.images.decoding import CHANNELS, decode
from surm_jax.data.prepared import PreparedSet, Records, open_prepared
from surm_jax.errors import UserError

# The number of records that are read at once to get their labels.
_CHUNK = 1000


@dataclass(frozen=True)
class TfdsSource:
    """An `ImageSource` that decodes the records of one split of a prepared data set.

    Attributes:
        records: The records. Each holds the encoded bytes of an image under "image" and a number under "label".
        channels: The number of channels of the decoded images: 1, 3 or 4.
        num_classes: The number of classes. Labels must be below it.
        name: The name of this split in error messages.

    Raises:
        CorruptExampleError: When an example is read, if its record is damaged, its image cannot be decoded, or its
            label is not one of the classes. The message names the example.
    """

    records: Records
    channels: int
    num_classes: int
    name: str

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """The labels of all examples. No image is decoded for them. 50,000 records take a second."""
        labels: list[int] = []
        for start in range(0, len(self), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(self)))
            try:
                records: Iterable[dict[str, Any]] = self.records.__getitems__(indices)
            except RuntimeError:
                records = map(self._record, indices)  # Reading one by one finds the damaged record.
            labels += map(self._label, indices, records)
        return np.array(labels)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        label = self._label(index, record)
        try:
            image = decode(record["image"], self.channels)
        except UserError as error:
            raise CorruptExampleError(f"{self.name}: the image of example {index} {error}") from error
        return {"image": image, "label": label}

    def identity(self) -> str:
        """Return the name of the split and the number of channels of its images."""
        return f"{self.name}, {self.channels} channels"

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self.records[index]
        except RuntimeError as error:  # The C++ reader raises it, and opens a file only when a record is read.
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
    """Open an image classification data set that TensorFlow Datasets has prepared.

    This takes milliseconds, after the import of tensorflow_datasets, which takes half a second.

    Args:
        name: The name of the data set, such as `cifar10`, `cifar10:3.0.2`, `name/config` or `name/config:version`.
            Without a version, the newest prepared one is opened.
        data_dir: The folder of prepared data sets. `None` means `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` if this
            variable is not set.

    Raises:
        UserError: The name is unknown, the data set is not prepared in `data_dir`, its files are missing or damaged, or
            it is not an image classification data set with a split "train" and a split "test" or "validation". Nothing
            is ever downloaded. The message says how to prepare the data set.
    """
    prepared = open_prepared(name, data_dir, EMBEDDED)
    import tensorflow_datasets as tfds  # Other data sets do not need this import.

    image, label = _features(prepared, tfds)
    channels = image.shape[-1] or 3
    splits = _splits(prepared)
    train, test = (
        TfdsSource(
            prepared.records(split, {"image": tfds.decode.SkipDecoding()}),
            channels,
            label.num_classes,
            f"{name}, split {split}",
        )
        for split in splits
    )
    shape = (*image.shape[:2], channels)
    return ImageDataset(prepared.full_name, train, test, tuple(label.names), shape, prepared.files(splits))


def _features(prepared: PreparedSet, tfds: Any) -> tuple[Any, Any]:
    """Return the feature objects of tensorflow_datasets for "image" and "label", after checking their types."""
    image, label = (prepared.features.get(key) for key in ("image", "label"))
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or image.np_dtype != np.uint8
        or (image.shape[-1] or 3) not in CHANNELS
    ):
        has = ", ".join(f"{key} ({type(value).__name__})" for key, value in prepared.features.items())
        raise UserError(
            f"data set {prepared.name!r} is not an image classification set: it needs a uint8 'image' of 1, 3 or 4 "
            f"channels and a class 'label', but its features are {has}"
        )
    return image, label


def _splits(prepared: PreparedSet) -> tuple[str, str]:
    """Return the names of the training and the test split. "validation" is the test split if there is no "test"."""
    test = next((split for split in ("test", "validation") if split in prepared.splits), None)
    if "train" not in prepared.splits or test is None:
        raise UserError(
            f"data set {prepared.name!r} has the splits {', '.join(prepared.splits)}; it needs 'train', and 'test' or "
            "'validation'"
        )
    return "train", test
