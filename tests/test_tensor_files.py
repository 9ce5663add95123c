"""Tests of reading and writing single safetensors files, and of reading sharded checkpoints with an index."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.files import read_json
from surm_jax.tensor_files import ShardedTensors, TensorFile, shards_of, write_tensors

ARRAYS = {
    "z": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "a": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "m": np.array([3.0], np.float16),
}
SHARD_OF = {"z": "model-2.safetensors", "a": "model-1.safetensors", "m": "model-2.safetensors"}


def write_shards(folder, shard_of=SHARD_OF, weight_map=SHARD_OF):
    for shard in set(shard_of.values()):
        save_file({key: ARRAYS[key] for key in shard_of if shard_of[key] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 30}, "weight_map": weight_map}))
    return index


def assert_holds_arrays(file):
    assert sorted(file.keys) == sorted(ARRAYS)
    for key, array in ARRAYS.items():
        assert file.read(key).dtype == array.dtype
        np.testing.assert_array_equal(file.read(key), array)


def test_one_file(tmp_path):
    write_tensors(tmp_path / "x.safetensors", ARRAYS, {"format": "pt"})
    assert load_file(tmp_path / "x.safetensors").keys() == ARRAYS.keys()
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert_holds_arrays(file)
        assert file.header == {"format": "pt"}
        held = file.read("z")
    # The array that was read is a copy, so it does not change if the file does.
    (tmp_path / "x.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(held, ARRAYS["z"])


def test_arrays_that_are_not_contiguous_are_written_as_they_look(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"t": ARRAYS["z"].T}, {})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["t"], ARRAYS["z"].T)


def test_keys_are_in_the_order_of_the_file(tmp_path):
    write_tensors(tmp_path / "x.safetensors", ARRAYS, {})
    content = (tmp_path / "x.safetensors").read_bytes()
    with TensorFile(tmp_path / "x.safetensors") as file:
        places = [content.find(file.read(key).tobytes()) for key in file.keys]
    assert places == sorted(places)


def test_missing_and_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=f"cannot read {path}: No such file"), TensorFile(path):
        pass
    write_tensors(path, ARRAYS, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path} is damaged"), TensorFile(path):
        pass


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F8_E4M3", [2], 2), ("F4", [4], 2), ("F32", [1] * 70, 4), ("F32", [2**62, 0, 2**62], 0)],
)
def test_what_numpy_has_no_place_for(tmp_path, dtype, shape, size):
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    with pytest.raises(UserError, match=f"{path} is damaged"), TensorFile(path) as file:
        file.read("x")


def test_what_is_raised_inside_is_not_blamed_on_the_file(tmp_path):
    write_tensors(tmp_path / "x.safetensors", ARRAYS, {})
    with pytest.raises(OSError, match="of another"), TensorFile(tmp_path / "x.safetensors"):
        raise OSError("of another")


def test_shards(tmp_path):
    with ShardedTensors(write_shards(tmp_path)) as file:
        assert_holds_arrays(file)


def refused(index, message):
    with pytest.raises(UserError, match=message), ShardedTensors(index):
        pass


def test_shards_that_are_missing_or_damaged(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"12345678")
    refused(index, r"model-1\.safetensors is damaged")
    (tmp_path / "model-1.safetensors").unlink()
    refused(index, r"lists the shard 'model-1\.safetensors', which is not in")


def test_index_and_shards_must_agree(tmp_path):
    index = write_shards(tmp_path, weight_map={**SHARD_OF, "zz": "model-2.safetensors"})
    refused(index, r"says that 'model-2\.safetensors' holds 'zz', which it does not; did you mean 'z'")
    index = write_shards(tmp_path, weight_map={"z": "model-2.safetensors", "a": "model-1.safetensors"})
    refused(index, r"'model-2\.safetensors' holds 'm', which .*index\.json does not list")
    index = write_shards(tmp_path, weight_map={**SHARD_OF, "m": "model-1.safetensors"})
    refused(index, r"says that 'model-1\.safetensors' holds 'm'")
    save_file({"a": ARRAYS["a"], "m": ARRAYS["m"]}, tmp_path / "model-1.safetensors")
    refused(index, r"'model-2\.safetensors' holds 'm', which .* puts into 'model-1\.safetensors'")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "https://a.org/x.safetensors",
    ],
)
def test_shards_are_plain_names(tmp_path, name):
    index = write_shards(tmp_path, weight_map={**SHARD_OF, "m": name})
    refused(index, "a shard must be a .safetensors file in the same folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "is damaged"),
        ("{}", "'weight_map' must give"),
        ('{"weight_map": []}', "'weight_map' must give"),
        ('{"weight_map": {}}', "'weight_map' must give"),
        ('{"weight_map": {"a": 1}}', "'weight_map' must give"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "it has 'a' twice"),
    ],
)
def test_damaged_index(tmp_path, text, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        shards_of(index)
    assert str(index) in str(error.value)


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent\.json: No such file"):
        read_json(tmp_path / "absent.json")
