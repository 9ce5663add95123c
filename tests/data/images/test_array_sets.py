"""Compare the digits and .npz files with scikit-learn and NumPy, and refuse damaged and unsuitable files."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from sklearn import datasets

from surm_jax.data import load
from surm_jax.errors import UserError


def pixels(source) -> set[tuple[bytes, int]]:
    return {(source[i]["image"].tobytes(), source[i]["label"]) for i in range(len(source))}


def original(kept: range) -> set[tuple[bytes, int]]:
    digits = datasets.load_digits()
    return {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label) - kept.start)
        for image, label in zip(digits.images, digits.target, strict=True)
        if label in kept
    }


@pytest.mark.parametrize(
    ("name", "kept"), [("digits", range(10)), ("digits_0to4", range(5)), ("digits_5to9", range(5, 10))]
)
def test_digits_are_all_there_once_relabelled_and_split_in_every_class(name, kept):
    data = load(name)
    assert data.classes == tuple(str(digit) for digit in kept)
    assert data.image_shape == data.train[0]["image"].shape == (8, 8, 1)
    assert data.train[0]["image"].dtype == np.uint8
    assert pixels(data.train) | pixels(data.test) == original(kept)
    assert not pixels(data.train) & pixels(data.test)
    assert len(data.train) + len(data.test) == np.isin(datasets.load_digits().target, kept).sum()
    train, test = (np.bincount([s[i]["label"] for i in range(len(s))]) for s in (data.train, data.test))
    assert len(train) == len(test) == len(kept)
    np.testing.assert_allclose(test / (train + test), 1 / 3, atol=0.01)


def test_the_halves_of_the_digits_cut_the_same_split():
    whole, low, high = load("digits"), load("digits_0to4"), load("digits_5to9")
    for split in ("train", "test"):
        shifted = {(image, label + 5) for image, label in pixels(getattr(high, split))}
        assert pixels(getattr(low, split)) | shifted == pixels(getattr(whole, split))


def arrays(**changes):
    rng = np.random.default_rng(0)
    good = {
        "train_images": rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8),
        "test_labels": np.array([2, 0], dtype=np.uint8),
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def write(**changes) -> str:
        np.savez(tmp_path / "set.npz", **arrays(**changes))
        return str(tmp_path / "set.npz")

    return write


def test_npz_gives_back_what_was_written(write):
    path = write(classes=np.array(["ant", "bee", "cow"]))
    data, expected = load(path), arrays()
    assert (data.name, data.classes, data.image_shape) == (path, ("ant", "bee", "cow"), (4, 5, 3))
    assert (len(data.train), len(data.test)) == (6, 2)
    for split in ("train", "test"):
        source = getattr(data, split)
        for i, label in enumerate(expected[f"{split}_labels"]):
            np.testing.assert_array_equal(source[i]["image"], expected[f"{split}_images"][i])
            assert source[i]["label"] == label


def test_npz_without_names_counts_the_classes(write):
    assert load(write()).classes == ("0", "1", "2")


def test_npz_float_images_keep_their_values_as_float32(write):
    images = np.linspace(-1, 1, 6 * 60).reshape(6, 4, 5, 3)
    image = load(write(train_images=images)).train[3]["image"]
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, images[3].astype(np.float32))


def test_npz_float32_images_are_in_memory_once(write):
    images = np.linspace(-1, 1, 6 * 300 * 300 * 3, dtype=np.float32).reshape(6, 300, 300, 3)
    path = write(train_images=images, test_images=images[:1, ...], test_labels=np.array([0]))
    load(path)  # The first call also imports modules, whose memory is not measured.
    tracemalloc.start()
    load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.nbytes < peak < 1.6 * images.nbytes


def with_value(value, dtype=np.float32):
    images = np.zeros((2, 4, 5, 3), dtype)
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels: it holds test_images, train_images, train_labels"),
        ({"train_images": None, "train_image": np.zeros(3)}, "lacks train_images.*did you mean 'train_image'"),
        ({"test_images": with_value(np.nan)}, r"test_images\[1, 2, 3, 0\] is nan, but .* must be finite"),
        ({"test_images": with_value(-np.inf)}, r"test_images\[1, 2, 3, 0\] is -inf"),
        (
            {"test_images": with_value(255.0, np.float64)},
            r"test_images\[1, 2, 3, 0\] is 255.0.*already scaled to \[-1, 1\]",
        ),
        (
            {"train_images": np.linspace(0, 1, 360, dtype=np.float32).reshape(6, 4, 5, 3)},
            r"train_images lies in \[0, 1\], but .* \[-1, 1\], and their black is -1: .*2 \* images - 1",
        ),
        ({"test_images": with_value(7, np.int64)}, "test_images is int64, but must be uint8"),
        ({"train_images": np.zeros((6, 4, 5), np.uint8)}, r"\(6, 4, 5\).*images\[..., None\]"),
        ({"train_images": np.zeros((0, 4, 5, 3), np.uint8), "train_labels": np.zeros(0, int)}, "train_images is empty"),
        (
            {"test_images": np.zeros((2, 4, 4, 3), np.uint8)},
            r"train_images are \(4, 5, 3\) and test_images \(4, 4, 3\)",
        ),
        ({"train_labels": np.zeros(5, int)}, r"train_labels has shape \(5,\), but its images need \(6,\)"),
        ({"train_labels": np.zeros(6)}, "train_labels is float64, but labels must be integers"),
        ({"test_labels": np.array([0, 3])}, r"test_labels\[1\] is 3, but labels must be 0 to 2"),
        ({"train_labels": np.array([0, 1, -1, 0, 1, 2])}, r"train_labels\[2\] is -1"),
        ({"train_labels": np.array([0, 1, 2**62, 0, 1, 2])}, r"train_labels\[2\] is 46\d+, but .* below 1,000,000"),
        (
            {"train_labels": np.array([0, 1, 2**64 - 1, 0, 1, 2], np.uint64)},
            r"train_labels\[2\] is 18446744073709551615",
        ),
        ({"classes": np.array([2**31 - 1] * 3, np.uint32).view("<U1")}, "classes holds strings that are not text"),
        ({"classes": np.array(["a", "b"])}, r"train_labels\[2\] is 2, but labels must be 0 to 1 \(2 classes"),
        ({"classes": np.array(["a", "b", "a"])}, "the classes 0 and 2 are both named 'a'"),
        ({"train_labels": np.zeros(6, int), "test_labels": np.zeros(2, int)}, r"has 1 class\(es\)"),
        ({"train_images": np.zeros((6, 4, 5, 3), ml_dtypes.bfloat16)}, "train_images.* bfloat16.* float32"),
        ({"classes": np.array([1, 2, 3])}, "classes has dtype int64"),
        ({"classes": np.array(["a", "b", "c"], dtype=object)}, "pickled objects"),
    ],
)
def test_npz_names_what_is_wrong(write, changes, message):
    path = write(**changes)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert path in str(error.value)


def test_npz_that_is_damaged_says_so(write, tmp_path):
    path = write()
    whole = (tmp_path / "set.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    bare = tmp_path / "bare.npy"
    np.save(bare, np.zeros(3))
    (tmp_path / "set.npz").write_bytes(bare.read_bytes())
    with pytest.raises(UserError, match="holds a single array"):
        load(path)
    for content in (b"", b"not a zip file", whole[: len(whole) // 2], bytes(flipped)):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load(path)


def test_npz_below_the_home_folder(write, tmp_path, monkeypatch):
    write()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("~/set.npz").train) == 6


def test_npz_that_is_not_there_names_its_neighbour(write, tmp_path):
    write()
    with pytest.raises(UserError, match=r"no data file .*sets\.npz; did you mean 'set\.npz'\?"):
        load(str(tmp_path / "sets.npz"))
    with pytest.raises(UserError, match="no data file"):
        load(str(tmp_path / "nowhere" / "set.npz"))
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    with pytest.raises(UserError, match="no data file"):
        load(str(tmp_path / "loop.npz"))
