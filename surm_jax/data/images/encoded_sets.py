"""Image data sets that are stored as image files, in an .npz file or in folders named after classes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from surm_jax.data.corrupt import CorruptExampleError
from surm_jax.data.images.checks import check_labels, check_range, warn_of_empty
from surm_jax.data.images.dataset import ImageDataset
from surm_jax.data.images.decoding import decode
from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import Npz, open_npz

TEST_SPLITS = ("test", "validation", "val")
"""The names that the folder of test images can have, in the order in which they are looked for."""
_KEYS = ("jpeg", "offsets", "labels", "class_names")
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A sequence of byte strings that lie one after another in an array.

    Attributes:
        content: All byte strings together, of shape (total bytes,).
        offsets: The place where each byte string begins, and the end of the last one, of shape (n + 1,).
    """

    content: UInt8[np.ndarray, "total"]
    offsets: Int[np.ndarray, "n_plus_1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.content[self.offsets[index] : self.offsets[index + 1]].tobytes()


@dataclasses.dataclass(frozen=True)
class EncodedSource:
    """An `ImageSource` that decodes images with three channels when they are read.

    Attributes:
        contents: The bytes of each image file, or the path of each image file.
        labels: An array of shape (n,) of integers counted from 0.
        name: The name of this split in error messages.

    Raises:
        CorruptExampleError: When an example is read, if its file cannot be read or decoded. The message names it.
    """

    contents: Sequence[bytes] | Pieces | Sequence[Path]
    labels: Int[np.ndarray, "n"]
    name: str

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        content, where = self.contents[index], f"{self.name}: the image of example {index}"
        try:
            if isinstance(content, Path):
                where = f"{self.name}: the image {content}"
                content = content.read_bytes()
            return {"image": decode(content, _CHANNELS), "label": int(self.labels[index])}
        except (UserError, OSError) as error:
            raise CorruptExampleError(f"{where} {error}") from error

    def identity(self) -> str:
        """Return the name of the split. The content of its files counts through `ImageDataset.files`."""
        return self.name


def load_encoded(path: Path) -> ImageDataset:
    """Load images that are stored as files in a pair of .npz files, `NAME_train.npz` and `NAME_test.npz`.

    Each file holds four arrays:

    - `jpeg` holds the bytes of all image files one after another, in any format that Pillow reads, as uint8.
    - `offsets`, of n + 1 integers, holds the place in `jpeg` where each image begins, and the end of the last one.
    - `labels`, of n integers, holds the labels, counted from 0.
    - `class_names` holds the names of the classes as strings. They are the same in both files.

    Args:
        path: The path of the file with the training images.

    Raises:
        UserError: A file or an array is missing or damaged, has a wrong shape, dtype or value, or the two files have
            different classes.
    """
    if not path.stem.endswith("_train"):
        raise UserError(f"{path} holds encoded images: name the file of the training images, NAME_train.npz")
    test = path.with_name(path.stem.removesuffix("_train") + "_test.npz")
    (train_source, classes), (test_source, test_classes) = (_read(file) for file in (path, test))
    if classes != test_classes:
        raise UserError(f"{test}: class_names differ from those in {path.name}")
    return _dataset(str(path), train_source, test_source, classes, (path, test))


def _read(path: Path) -> tuple[EncodedSource, tuple[str, ...]]:
    with open_npz(path) as archive:
        arrays = {key: _array(path, archive, key) for key in _KEYS}
    content, offsets, labels, names = arrays.values()
    if content.dtype != np.uint8 or content.ndim != 1:
        raise UserError(f"{path}: jpeg is {content.dtype} of shape {content.shape}, but must be a list of bytes")
    ends = offsets.ndim == 1 and len(offsets) > 1 and offsets.dtype.kind in "iu"
    if not ends or offsets[0] != 0 or offsets[-1] != len(content) or np.any(offsets[1:] <= offsets[:-1]):
        raise UserError(f"{path}: offsets must increase from 0 to the {len(content)} bytes of jpeg")
    check_labels(f"{path}: labels", labels, len(offsets) - 1)
    if names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{path}: class_names has dtype {names.dtype}, but must be a list of strings")
    return EncodedSource(Pieces(content, offsets), labels, str(path)), tuple(map(str, names))


def _array(path: Path, archive: Npz, key: str) -> np.ndarray:
    if key not in archive.keys:
        raise UserError(f"{path} lacks {key}: it holds {', '.join(archive.keys)}{did_you_mean(key, archive.keys)}")
    return archive.read(key)


def load_folder(path: Path) -> ImageDataset:
    """Load a folder of image files, in which the name of a folder is the name of a class.

    The file of an image of class CLASS is `train/CLASS/FILE` or `test/CLASS/FILE`, where the folder of the test images
    may also be called `validation` or `val`. FILE has any format that Pillow reads. Hidden files and files without the
    suffix of an image are left out. The classes are sorted by name.

    Args:
        path: The folder that holds the folders `train` and `test`.

    Raises:
        UserError: A folder is missing, holds no images, or the test images have a class without training images.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder of images {path.absolute()}")
    held = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    test = next((name for name in TEST_SPLITS if name in held), None)
    if "train" not in held or test is None:
        raise UserError(
            f"{path} must hold the folders train and test (or validation), each with a folder of images for every"
            f" class, but it holds {', '.join(held) or 'no folder'}"
        )
    classes = tuple(entry.name for entry in _entries(path / "train") if entry.is_dir())
    (train, train_files), (held_out, test_files) = (_of_classes(path / name, classes) for name in ("train", test))
    return _dataset(str(path), train, held_out, classes, (*train_files, *test_files))


def _of_classes(folder: Path, classes: tuple[str, ...]) -> tuple[EncodedSource, list[Path]]:
    """Return the images in the folders of some classes, and the paths of their files."""
    suffixes = Image.registered_extensions()
    files: list[Path] = []
    labels: list[int] = []
    for entry in _entries(folder):
        if entry.is_dir() and entry.name not in classes:
            raise UserError(f"{folder} has the class {entry.name!r}, but the training images have {', '.join(classes)}")
        images = [f for f in _entries(entry) if f.suffix.lower() in suffixes] if entry.is_dir() else []
        files += images
        labels += [classes.index(entry.name)] * len(images) if images else []
    if not files:
        raise UserError(f"{folder} holds no images: they belong in a folder for each class, such as {folder / 'cat'}")
    return EncodedSource(files, np.array(labels), str(folder)), files


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _dataset(
    name: str, train: EncodedSource, test: EncodedSource, classes: tuple[str, ...], files: tuple[Path, ...]
) -> ImageDataset:
    for source in (train, test):
        check_range(f"{source.name}: labels", source.labels, classes)
    warn_of_empty(f"{train.name}: labels", train.labels, classes)
    return ImageDataset(name, train, test, classes, (None, None, _CHANNELS), files)
