"""Tests of data sets of TensorFlow Datasets: small ones that the tests write, and CIFAR-10 if it is there."""

import io
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from surm_jax.data import eval_batches, load, tfds_sets, train_batches
from surm_jax.errors import UserError
from tests.data.prepared import write_set


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return the bytes of a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(image: bytes, kind: bytes, content: bytes) -> bytes:
    """Return a PNG image with an additional chunk after its header, or with a new header if `kind` is `b"IHDR"`."""
    signature, header, rest = image[:8], image[8:33], image[33:]
    return signature + (b"" if kind == b"IHDR" else header) + chunk(kind, content) + rest


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3), dtype=np.uint8)
RECORDS = {"train": [(png(image), i) for i, image in enumerate(IMAGES)], "test": [(png(IMAGES[0]), 2)]}


FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(names=["disc", "ring", "star"]),
}


@pytest.fixture
def prepare(tmp_path):
    def prepare(name="shapes", version="1.0.0", records=RECORDS, features=FEATURES, file_format="array_record"):
        splits = {split: [{"image": image, "label": label} for image, label in rows] for split, rows in records.items()}
        return write_set(tmp_path, name, version, features, splits, file_format)

    return prepare


@pytest.mark.parametrize("name", ["shapes", "shapes:1.0.0", "shapes/small", "shapes/small:1.0.0"])
def test_a_prepared_set_is_read_back(prepare, tmp_path, name):
    folder = prepare(name.split(":")[0])
    data = load(name, tmp_path)
    assert {path.name for path in data.files} == {path.name for path in folder.iterdir()}
    assert sum("labels" in path.name for path in data.files) == 1
    assert data.classes == ("disc", "ring", "star")
    assert data.image_shape == (None, None, 3)
    assert (len(data.train), len(data.test)) == (3, 1)
    for i, image in enumerate(IMAGES):
        np.testing.assert_array_equal(data.train[i]["image"], image)
        assert data.train[i]["label"] == i
    assert data.test[0]["label"] == 2
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 2], [2])


def test_labels_are_read_in_chunks_and_no_image_is_decoded(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_sets, "_CHUNK", 2)
    prepare(records={"train": [(b"no image", label) for label in (2, 0, 1, 1, 0)], "test": [(b"", 1), (b"", 5)]})
    data = load("shapes", tmp_path)
    assert data.train.labels.tolist() == [2, 0, 1, 1, 0]
    with pytest.raises(UserError, match="split test: example 1 has label 5, outside 0 to 2"):
        data.test.labels  # noqa: B018


def test_the_newest_version_is_taken_by_number(prepare, tmp_path):
    for version, rows in (("9.0.0", 1), ("10.0.0", 2)):
        prepare(version=version, records={"train": RECORDS["train"][:rows], "test": RECORDS["test"]})
    newest, older = load("shapes", tmp_path), load("shapes:9.0.0", tmp_path)
    assert (newest.name, len(newest.train)) == ("shapes:10.0.0", 2)
    assert (older.name, len(older.train)) == ("shapes:9.0.0", 1)
    with pytest.raises(UserError, match=r"holds shapes in version 9\.0\.0, 10\.0\.0, not 8\.0\.0"):
        load("shapes:8.0.0", tmp_path)


def test_the_folder_comes_from_the_environment(prepare, tmp_path, monkeypatch):
    prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(load("shapes").train) == 3


def test_validation_stands_in_for_test(prepare, tmp_path):
    prepare(records={"train": RECORDS["train"], "validation": RECORDS["train"][:2]})
    assert len(load("shapes", tmp_path).test) == 2


def test_images_take_the_declared_channels(prepare, tmp_path):
    grey = {"image": tfds.features.Image(shape=(5, 6, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
    prepare(features=grey, records={split: [(png(IMAGES[0, ..., 0]), 1)] for split in ("train", "test")})
    data = load("shapes", tmp_path)
    assert (data.image_shape, data.channels, data.classes) == ((5, 6, 1), 1, ("0", "1", "2"))
    np.testing.assert_array_equal(data.train[0]["image"], IMAGES[0, ..., :1])


def test_grey_files_in_a_colour_set_become_colour(prepare, tmp_path):
    prepare(records={split: [(png(IMAGES[0, ..., 0]), 1)] for split in ("train", "test")})
    np.testing.assert_array_equal(load("shapes", tmp_path).train[0]["image"], np.repeat(IMAGES[0, ..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((b"no image", 0), "shapes, split train: the image of example 1 cannot be decoded"),
        ((RECORDS["train"][1][0][:60], 0), "the image of example 1 cannot be decoded"),
        (
            # This header announces 40,000 x 40,000 pixels.
            (with_chunk(RECORDS["train"][1][0], b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)), 0),
            "the image of example 1 cannot be decoded .*1600000000 pixels",
        ),
        (
            # This compressed comment has 2 MiB after decompression.
            (with_chunk(RECORDS["train"][1][0], b"zTXt", b"comment\0\0" + zlib.compress(bytes(2**21))), 0),
            "the image of example 1 cannot be decoded .*Decompressed data too large",
        ),
        ((RECORDS["train"][1][0], -1), "example 1 has label -1, outside 0 to 2"),
    ],
)
def test_a_bad_record_is_named_when_read(prepare, tmp_path, row, message):
    prepare(records={"train": [RECORDS["train"][0], row], "test": RECORDS["test"]})
    data = load("shapes", tmp_path)
    assert data.train[0]["label"] == 0
    with pytest.raises(UserError, match=message):
        data.train[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": {"test": RECORDS["test"]}}, "has the splits test; it needs 'train', and 'test' or 'validation'"),
        ({"records": {"train": RECORDS["test"], "extra": []}}, "has the splits (train, extra|extra, train);"),
        ({"file_format": "tfrecord"}, "holds tfrecord files.*--file_format=array_record"),
        (
            {"features": {"image": tfds.features.Image(shape=(5, 6, 3)), "caption": tfds.features.Text()}},
            r"not an image classification set.*its features are .*caption \(Text\)",
        ),
        (
            {
                "features": {
                    "image": tfds.features.Image(shape=(5, 6, 1), dtype=np.uint16, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
            },
            "needs a uint8 'image'",
        ),
    ],
)
def test_sets_of_another_kind_are_refused(prepare, tmp_path, changes, message):
    prepare(**changes)
    with pytest.raises(UserError, match=message):
        load("shapes", tmp_path)


def test_a_missing_shard_is_named(prepare, tmp_path):
    folder = prepare()
    shard = folder / "shapes-test.array_record-00000-of-00001"
    shard.unlink()
    with pytest.raises(UserError, match=f"is incomplete: {re.escape(str(shard))} is missing"):
        load("shapes", tmp_path)


def test_an_unprepared_set_says_where_it_looked_and_how_to_prepare(prepare, tmp_path):
    prepare()
    with pytest.raises(UserError) as error:
        load("cifar100", tmp_path)
    message = str(error.value)
    assert f"not prepared in {tmp_path} (it holds shapes:1.0.0)" in message
    assert "pip install '.[tfds]'" in message
    assert f"tfds build cifar100 --file_format=array_record --data_dir={tmp_path}" in message


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        UserError, match=f"the data folder {re.escape(str(tmp_path))}/none does not exist.*tfds build cifar10 "
    ):
        load("cifar10", tmp_path / "none")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_named(prepare, tmp_path, file):
    (prepare() / file).write_text('{"name": ')
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/shapes/1.0.0 is damaged.*tfds build shapes"):
        load("shapes", tmp_path)


def test_a_truncated_shard_is_named_when_read(prepare, tmp_path):
    shard = prepare() / "shapes-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match="shapes, split train: example 2 cannot be read, its file is damaged"):
        load("shapes", tmp_path).train[2]
    with pytest.raises(UserError, match=r"shapes, split train: example \d cannot be read, its file is damaged"):
        load("shapes", tmp_path).train.labels  # noqa: B018


@pytest.mark.parametrize(("name", "near"), [("digit_5to9", "digits_5to9"), ("cifar1O", "cifar10"), ("shape", "shapes")])
def test_an_unknown_name_lists_its_neighbours(prepare, tmp_path, name, near):
    prepare()
    with pytest.raises(UserError, match=f"unknown data set '{name}'") as error:
        load(name, tmp_path)
    assert f"'{near}'" in str(error.value).split("Known are")[0]


# This program hides TensorFlow, blocks every connection, and makes a training batch and an evaluation batch.
_WITHOUT_TENSORFLOW = """
import sys, socket, time
from importlib.machinery import PathFinder
class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "tensorflow" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
def refuse(*args): raise OSError("no network")
socket.socket.connect = refuse
from surm_jax.data import eval_batches, load, tfds_sets, train_batches
begin = time.perf_counter()
data = load("shapes", sys.argv[1])
train = next(train_batches(data.train, batch_size=2, image_size=4, augment="crop_flip", seed=0))
test = next(iter(eval_batches(data.test, batch_size=2, image_size=4)))
assert train["image"].shape == test["image"].shape == (2, 4, 4, 3)
assert time.perf_counter() - begin < 20, "starting took too long"
assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]
print("read without TensorFlow")
"""


@pytest.mark.exhaustive
def test_tensorflow_is_not_needed(prepare, tmp_path):
    prepare()
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TENSORFLOW, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "read without TensorFlow" in done.stdout


@pytest.mark.exhaustive
def test_real_cifar10(shared):
    data = load("cifar10", shared / "tfds")
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert (len(data.classes), data.image_shape) == (10, (32, 32, 3))
    builder = tfds.builder_from_directory(shared / "tfds" / "cifar10" / "3.0.2")
    assert data.classes == tuple(builder.info.features["label"].names)
    np.testing.assert_array_equal(np.bincount(data.test.labels), [1000] * 10)
    assert data.test.labels[:20].tolist() == [data.test[i]["label"] for i in range(20)]
    batches = eval_batches(data.test, batch_size=64, image_size=32)
    assert len(batches) == 157
    batch, reference = next(iter(batches)), builder.as_data_source("test")
    for i in range(64):
        np.testing.assert_allclose(batch["image"][i], reference[i]["image"] / 127.5 - 1, atol=1e-6)
        assert batch["label"][i] == reference[i]["label"]
    batch = next(train_batches(data.train, batch_size=64, image_size=224, augment="crop_flip", seed=0))
    assert batch["image"].shape == (64, 224, 224, 3)
    assert len(set(batch["label"])) > 6
