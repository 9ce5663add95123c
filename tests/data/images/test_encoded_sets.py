"""Compare image files in .npz files and in folders with the pixels that Pillow decodes."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from surm_jax.data import load
from surm_jax.data.corrupt import CorruptExampleError
from surm_jax.errors import UserError

SETS = Path(__file__).parents[3].parent / "shared" / "data" / "vtab"
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), np.uint8)


def png(pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def write_pair(folder: Path, **changes) -> str:
    files = [png(pixels) for pixels in COLOURS]
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array([0, 1, 1, 0]),
        "class_names": np.array(["cat", "dog"]),
    }
    np.savez(folder / "pets_test.npz", **arrays)
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    np.savez(folder / "pets_train.npz", **arrays)
    return str(folder / "pets_train.npz")


def write_folders(folder: Path, test: str = "test") -> str:
    for split in ("train", test):
        for number, pixels in enumerate(COLOURS):
            place = folder / split / ("cat", "dog")[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(pixels))
        (folder / split / ".DS_Store").touch()
        (folder / split / "cat" / "notes.txt").touch()
    return f"{folder}/"


def check(dataset, labels, order):
    assert dataset.classes == ("cat", "dog") and dataset.image_shape == (None, None, 3)
    for source in (dataset.train, dataset.test):
        assert source.labels.tolist() == labels and len(source) == 4
        for index, number in enumerate(order):
            np.testing.assert_array_equal(source[index]["image"], COLOURS[number])
            assert source[index]["label"] == labels[index]


def test_image_files_in_a_pair_of_npz_files(tmp_path):
    dataset = load(write_pair(tmp_path))
    check(dataset, [0, 1, 1, 0], range(4))
    assert [file.name for file in dataset.files] == ["pets_train.npz", "pets_test.npz"]


@pytest.mark.parametrize("test", ["test", "validation"])
def test_folders_of_image_files_by_class(tmp_path, test):
    dataset = load(write_folders(tmp_path, test))
    check(dataset, [0, 0, 1, 1], [0, 2, 1, 3])
    assert len(dataset.files) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": None}, "lacks offsets: it holds jpeg, labels, class_names"),
        ({"offsets": np.array([0, 5, 3, 9, 4])}, "offsets must increase from 0 to the"),
        ({"labels": np.array([0, 1])}, "labels has shape (2,), but its images need (4,)"),
        ({"labels": np.array([0, 1, 2, 0])}, "labels[2] is 2, but labels must be 0 to 1"),
        ({"class_names": np.array(["cat", "cow"])}, "class_names differ from those in pets_train.npz"),
        ({"jpeg": np.zeros(3)}, "jpeg is float64 of shape (3,), but must be a list of bytes"),
    ],
)
def test_wrong_arrays(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(write_pair(tmp_path, **changes))


def test_the_file_of_the_test_images_and_a_missing_one(tmp_path):
    path = write_pair(tmp_path)
    with pytest.raises(UserError, match=r"name the file of the training images, NAME_train\.npz"):
        load(path.replace("train", "test"))
    (tmp_path / "pets_test.npz").unlink()
    with pytest.raises(UserError, match=r"pets_test\.npz"):
        load(path)


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match="there is no folder of images"):
        load(f"{tmp_path}/none/")
    path = write_folders(tmp_path)
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(UserError, match="has the class 'cow', but the training images have cat, dog"):
        load(path)
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(UserError, match=r"must hold the folders train and test .* but it holds other, train"):
        load(path)


def test_a_file_that_is_no_image_is_corrupt_and_named(tmp_path):
    path = write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    dataset = load(path)
    with pytest.raises(CorruptExampleError, match=r"0.png cannot be decoded"):
        dataset.train[0]
    assert dataset.train[1]["label"] == 0


@pytest.mark.skipif(not SETS.is_dir(), reason="needs ../shared/data/vtab")
@pytest.mark.parametrize(("name", "classes", "train", "test"), [("caltech101", 50, 1000, 500), ("gtsrb", 43, 989, 989)])
def test_real_sets(name, classes, train, test):
    dataset = load(f"{SETS}/{name}_train.npz")
    assert (len(dataset.classes), len(dataset.train), len(dataset.test)) == (classes, train, test)
    image = dataset.test[7]["image"]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.std() > 0
