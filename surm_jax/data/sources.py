"""One name, one data set: where `load` looks for it."""

import os

from surm_jax.data.array_sets import EMBEDDED, load_digits, load_npz
from surm_jax.data.dataset import ImageDataset
from surm_jax.data.tfds_sets import load_tfds


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Loads an image classification set. Never touches the network.

    Args:
        name: One of
            - `digits`, `digits_0to4`, `digits_5to9`: embedded, 8 x 8 grey images (see `load_digits`);
            - a path ending in `.npz`, relative to the working directory (see `load_npz`);
            - a set of TensorFlow Datasets, prepared before: `cifar10`, `name:version`, `name/config` (see `load_tfds`).
        data_dir: The folder of the prepared TFDS sets; `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`, if None.

    Raises:
        UserError: there is no such set, or it is damaged or of another kind.

    >>> data = load("digits_5to9")
    >>> len(data.train), len(data.test), data.classes, data.image_shape
    (597, 299, ('5', '6', '7', '8', '9'), (8, 8, 1))
    """
    if name in EMBEDDED:
        return load_digits(name)
    if name.endswith(".npz"):
        return load_npz(name)
    return load_tfds(name, data_dir)
