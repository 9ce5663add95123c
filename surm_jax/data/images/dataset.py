"""Image classification data sets, and the sources of examples that they consist of.

A source is a sequence whose examples can be read in any order.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from surm_jax.data.images.checks import check_classes, check_images, check_labels, check_range, warn_of_empty
from surm_jax.data.states import digest_of
from surm_jax.errors import UserError, did_you_mean
from surm_jax.preparation import Preparation

Images = UInt8[np.ndarray, "n height width channels"] | Float[np.ndarray, "n height width channels"]


class ImageSource(Protocol):
    """The interface of a sequence of labelled images that can be read in any order.

    `source[i]` is `{"image": array (height, width, channels), "label": int}`. A uint8 image has pixels 0..255, and the
    pixels of a float image must already be scaled to [-1, 1]. Several threads may read examples at the same time.
    """

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """The labels of all examples. Getting them does not decode any image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ArraySource:
    """An `ImageSource` whose images and labels are arrays in memory.

    Attributes:
        images: An array of shape (n, height, width, channels), uint8 or float32 in [-1, 1].
        labels: An array of shape (n,) of integers counted from 0.

    Raises:
        UserError: The arrays have another shape, dtype or range, or differ in length (`surm_jax.data.images.checks`).

    This source has two examples. The second one has the label 1:

    >>> source = ArraySource(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]))
    >>> len(source), source[1]["image"].shape, source[1]["label"]
    (2, (4, 4, 1), 1)
    """

    images: Images
    labels: Int[np.ndarray, "n"]

    def __post_init__(self):
        check_images("images", self.images)
        check_labels("labels", self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def identity(self) -> str:
        """Return a digest of the images."""
        return digest_of(np.asarray(self.images))


@dataclass(frozen=True)
class ImageDataset:
    """An image classification data set.

    Attributes:
        name: The name or path that was passed to `load`. For a prepared data set of TensorFlow Datasets, the version
            that was found is included.
        train: The training examples.
        test: The test examples. If the data set has no test split, they are its validation split.
        classes: The names of the classes. The label `k` stands for `classes[k]`.
        image_shape: The shape (height, width, channels) of the images. The height and width are None if they differ
            between images.
        files: The files that the data set was read from. It is empty if the data set is part of a package.

    Raises:
        UserError: There are fewer than two classes, two have the same name, or a label in memory is no class. A warning
            names the classes without a training example. The labels of other sources are checked when they are read.
    """

    name: str
    train: ImageSource
    test: ImageSource
    classes: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]
    files: tuple[Path, ...] = ()

    def __post_init__(self):
        check_classes(f"data set {self.name!r}", self.classes)
        for split, source in (("train", self.train), ("test", self.test)):
            if isinstance(source, ArraySource | _Relabelled):
                check_range(f"{self.name}: {split}_labels", source.labels, self.classes)
        if isinstance(self.train, ArraySource | _Relabelled):
            warn_of_empty(f"{self.name}: train_labels", self.train.labels, self.classes)

    @property
    def channels(self) -> int:
        """The number of colour channels, such as 1 for grey images and 3 for RGB."""
        return self.image_shape[-1]

    def require_channels(self, channels: int, preparation: Preparation | None = None) -> None:
        """Check that the prepared images have as many channels as a model reads.

        Args:
            channels: The number of channels that the model reads.
            preparation: How images are prepared. Only these settings may repeat or drop channels.

        Raises:
            UserError: The numbers of channels differ.
        """
        if channels != (preparation.channels(self.channels) if preparation else self.channels):
            raise UserError(
                f"data set {self.name!r} has images of {self.channels} channel(s), but the model reads {channels}: "
                f"choose a model that reads {self.channels}, or a data set with {channels}"
            )


@dataclass(frozen=True)
class Subset:
    """An `ImageSource` that consists of some examples of another source.

    Attributes:
        source: The source with all examples.
        indices: The indices in `source` of the examples in this subset, in the order of the subset.
    """

    source: ImageSource
    indices: Int[np.ndarray, "n"]

    @property
    def labels(self) -> Int[np.ndarray, "n"]:
        """The labels of the examples in this subset."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def identity(self) -> str | None:
        """Return a digest of what the images are, without their labels, or None if the source does not say it."""
        return (inner := identity_of(self.source)) and digest_of(inner, self.indices)


@dataclass(frozen=True)
class _Relabelled:
    """An `ImageSource` of the same examples as a subset, with new labels."""

    examples: Subset
    labels: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.examples[index], "label": int(self.labels[index])}

    def identity(self) -> str | None:
        return self.examples.identity()


def identity_of(source: ImageSource) -> str | None:
    """Return a text that differs if a source has other images, or None if the class of the source does not say it.

    It does not depend on the labels. The images of a prepared data set are represented by the name of their split.
    Their content is that of `ImageDataset.files`.
    """
    return getattr(source, "identity", lambda: None)()


def keep_classes(dataset: ImageDataset, classes: Sequence[str]) -> ImageDataset:
    """Return a data set with only the examples of some classes, in the same order as before.

    Args:
        dataset: The data set with all classes.
        classes: The names of the classes to keep. Their new labels are 0, 1, ... in this order.

    Raises:
        UserError: A name is unknown or is given twice, or a split has no example of these classes.

    Here the class "2" gets the label 0, the class "0" gets the label 1, and the example of class "1" is removed:

    >>> digits = ArraySource(np.zeros((4, 8, 8, 1), np.uint8), np.array([2, 0, 1, 2]))
    >>> kept = keep_classes(ImageDataset("digits", digits, digits, ("0", "1", "2"), (8, 8, 1)), ("2", "0"))
    >>> kept.classes, kept.train.labels.tolist()
    (('2', '0'), [0, 1, 0])
    """
    for name in classes:
        if name not in dataset.classes:
            raise UserError(
                f"data set {dataset.name!r} has no class {name!r}{did_you_mean(name, dataset.classes)}"
                f" (its classes: {', '.join(dataset.classes)})"
            )
    if len(set(classes)) < len(classes):
        raise UserError(f"every class can be named only once, got {', '.join(classes)}")
    new_labels = np.full(len(dataset.classes), -1)
    new_labels[[dataset.classes.index(name) for name in classes]] = np.arange(len(classes))

    def kept(split: str, source: ImageSource) -> ImageSource:
        labels = new_labels[source.labels]
        indices = np.flatnonzero(labels >= 0)
        if not indices.size:
            raise UserError(f"data set {dataset.name!r} has no {split} examples of the classes {', '.join(classes)}")
        return _Relabelled(Subset(source, indices), labels[indices])

    return dataclasses.replace(
        dataset, train=kept("training", dataset.train), test=kept("test", dataset.test), classes=tuple(classes)
    )
