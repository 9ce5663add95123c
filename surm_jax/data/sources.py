"""Data sets by name."""

import os

from surm_jax.data.images.array_sets import EMBEDDED, load_digits, load_npz
from surm_jax.data.images.dataset import ImageDataset
from surm_jax.data.images.tfds_sets import load_tfds
from surm_jax.data.text.dataset import TextDataset
from surm_jax.data.text.glue import load_glue


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset | TextDataset:
    """Load a set of labelled images or of labelled sentences, without the network.

    Args:
        name: One of
            - `digits`, `digits_0to4`, `digits_5to9`: embedded, 8 x 8 grey images (see `load_digits`);
            - a path that ends in `.npz` (see `load_npz`);
            - a task of GLUE that TensorFlow Datasets has prepared: `glue/rte`, `glue/rte:version` (see `load_glue`);
            - a set of images that TensorFlow Datasets has prepared: `cifar10`, `name:version`, `name/config` (see
              `load_tfds`).
        data_dir: The folder of prepared sets; `None` means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.

    Returns:
        A `TextDataset` for a task of GLUE, otherwise an `ImageDataset`.

    Raises:
        UserError: There is no such set, or it is damaged or of another kind.

    >>> data = load("digits_5to9")
    >>> len(data.train), len(data.test), data.classes, data.image_shape
    (597, 299, ('5', '6', '7', '8', '9'), (8, 8, 1))
    """
    if name in EMBEDDED:
        return load_digits(name)
    if name.endswith(".npz"):
        return load_npz(name)
    if is_text(name):
        return load_glue(name, data_dir)
    return load_tfds(name, data_dir)


def is_text(name: str) -> bool:
    """Return whether a name stands for sentences and not for images.

    >>> is_text("glue/rte"), is_text("cifar10")
    (True, False)
    """
    return name.partition("/")[0] == "glue"
