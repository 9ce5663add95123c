"""Load data sets of images or text by their names."""

import os
from pathlib import Path

from surm_jax.data.images.array_sets import EMBEDDED, load_digits, load_npz
from surm_jax.data.images.dataset import ImageDataset
from surm_jax.data.images.encoded_sets import load_folder
from surm_jax.data.text.dataset import TextDataset
from surm_jax.data.text.glue import load_glue
from surm_jax.data.tfds_sets import load_tfds


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset | TextDataset:
    """Load a data set of labelled images or labelled sentences, without the network.

    Args:
        name: The name of the data set, which is one of
            - `digits`, `digits_0to4`, `digits_5to9`: grey images of 8 x 8 pixels that scikit-learn contains (see
              `load_digits`);
            - a path that ends in `.npz` (see `load_npz`);
            - the path of a folder with image files by class (see `load_folder`). The path begins with `/`, `./`, `../`
              or `~`, or ends with `/`, so that it cannot be taken for another name;
            - a task of GLUE that TensorFlow Datasets has prepared, such as `glue/rte` or `glue/rte:version` (see
              `load_glue`);
            - a data set of images that TensorFlow Datasets has prepared, such as `cifar10`, `name:version` or
              `name/config` (see `load_tfds`).
        data_dir: The folder of prepared data sets. `None` means `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` if this
            variable is not set.

    Returns:
        A `TextDataset` for a task of GLUE, and otherwise an `ImageDataset`.

    Raises:
        UserError: There is no such data set, it is damaged, or it does not hold labelled images or sentences.

    >>> data = load("digits_5to9")
    >>> len(data.train), len(data.test), data.classes, data.image_shape
    (597, 299, ('5', '6', '7', '8', '9'), (8, 8, 1))
    """
    if name in EMBEDDED:
        return load_digits(name)
    if is_path(name):
        return load_npz(name) if name.endswith(".npz") else load_folder(Path(name).expanduser())
    if is_text(name):
        return load_glue(name, data_dir)
    return load_tfds(name, data_dir)


def is_path(name: str) -> bool:
    """Return whether the name of a data set stands for a file or a folder.

    >>> is_path("my.npz"), is_path("./flowers"), is_path("cifar10")
    (True, True, False)
    """
    return name.endswith((".npz", ".jsonl", "/")) or name.startswith(("/", "./", "../", "~"))


def is_text(name: str) -> bool:
    """Return whether the name of a data set stands for sentences. Otherwise it stands for images.

    >>> is_text("glue/rte"), is_text("cifar10")
    (True, False)
    """
    return name.partition("/")[0] == "glue"
