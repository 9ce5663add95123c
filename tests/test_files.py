"""Check that reading untrusted JSON and `.npz` files executes no code and never needs much memory or time."""

import io
import json
import os
import struct
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import is_finite, open_npz, read_json, require_file


class TestFiles:
    @pytest.mark.parametrize("read", [require_file, read_json])
    def test_what_is_no_file_is_not_opened(self, tmp_path, read):
        os.mkfifo(tmp_path / "pipe")  # Opening this pipe would block forever, because no process writes to it.
        for path in (tmp_path / "pipe", tmp_path):
            with pytest.raises(UserError, match=f"^cannot read {path}: it is not a regular file$"):
                read(path)
        (tmp_path / "loop").symlink_to("loop")
        for name in ("loop", "absent"):
            with pytest.raises(UserError, match=f"^cannot read {tmp_path / name}: "):
                read(tmp_path / name)


class TestJson:
    def test_size_is_looked_at_first(self, tmp_path):
        with (tmp_path / "x.json").open("wb") as file:
            file.truncate(2**40)  # This makes a sparse file of one tebibyte.
        with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, but such a file may have at most"):
            read_json(tmp_path / "x.json")

    def test_a_name_that_comes_twice_at_the_end_of_very_many(self, tmp_path):
        names = [f'"{i}": 0' for i in range(300_000)]
        (tmp_path / "x.json").write_text(f"{{{', '.join([*names, names[-1]])}}}")
        start = time.process_time()
        with pytest.raises(UserError, match="it has '299999' twice"):
            read_json(tmp_path / "x.json")
        assert time.process_time() - start < 10

    @pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' * 10**5, '{"a": ' + "9" * 5000 + "}", "\xff", "[]"])
    def test_damage(self, tmp_path, text):
        (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="is damaged: "):
            read_json(tmp_path / "x.json")


def header(shape, descr="<f4", order=False):
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def write(path, content, method=zipfile.ZIP_STORED, name="x.npy"):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)
    return path


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize(
        "array",
        [
            np.arange(6.0).reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
            np.float16(3.5),
            np.zeros((0, 4), np.uint8),
            np.array(["ant", "beetle"]),
        ],
        ids=str,
    )
    def test_gives_what_numpy_gives(self, tmp_path, save, array):
        save(tmp_path / "x.npz", x=array, y=np.ones(2))
        with open_npz(tmp_path / "x.npz") as file, np.load(tmp_path / "x.npz") as expected:
            assert file.keys == ("x", "y")
            read = file.read("x")
            assert (read.dtype, read.shape) == (expected["x"].dtype, expected["x"].shape)
            np.testing.assert_array_equal(read, expected["x"])

    def test_a_header_of_the_second_version(self, tmp_path):
        first = header((2,)) + np.float32([1.5, 2.5]).tobytes()
        second = first[:6] + b"\x02\x00" + first[8:10] + b"\0\0" + first[10:]
        with open_npz(write(tmp_path / "x.npz", second)) as file:
            assert file.read("x").tolist() == [1.5, 2.5]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (header((2**40,)), r"x.npy has 0 bytes for an array of shape \(1099511627776,\) and type float32"),
            (header((2**32, 2**32)), "has 0 bytes for an array of shape"),  # the number of entries is 0 modulo 2^64
            (header((10**30,)) + b"1234", "has 4 bytes for an array of shape"),
            (header((-1, -1)) + b"1234", "cannot be read as an .npz file"),
            (header((2**40,), "<U0"), "has 0 bytes for an array of shape"),  # NumPy would create 2^40 empty strings
            (header((1,), ("<f4", (2**28,))), "has 0 bytes for an array of shape"),
            (header((2,)) + b"1234", r"has 4 bytes for an array of shape \(2,\)"),
            (header((1,)) + b"12345678", r"has 8 bytes for an array of shape \(1,\)"),
            (header((1,), "|O") + b"cos\nsystem\n(S'exit 1'\ntR.", "holds pickled objects, which are not loaded"),
            (header((1,), [("a", "|O")]) + b"12345678", "holds pickled objects, which are not loaded"),
            (header((1,), ()) + b"1234", "cannot be read as an .npz file"),
            (header((1,), None) + b"1234", "cannot be read as an .npz file"),
            (header((1,)).replace(b"{", b"(" * 200, 1), "cannot be read as an .npz file"),
            (b"raw", "cannot be read as an .npz file"),
            (b"", "cannot be read as an .npz file"),
        ],
    )
    def test_sizes_are_compared_before_anything_is_allocated(self, tmp_path, content, message):
        path = write(tmp_path / "x.npz", content)
        tracemalloc.start()
        with pytest.raises(UserError, match=message) as error, open_npz(path) as file:
            file.read("x")
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
        assert str(path) in str(error.value)
        assert not isinstance(error.value.__cause__, MemoryError)

    @pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_damage_of_every_packing(self, tmp_path, method):
        content = io.BytesIO()
        np.save(content, np.random.default_rng(0).normal(size=500))
        whole = write(tmp_path / "x.npz", content.getvalue(), method).read_bytes()
        for at in range(60, len(whole) - 100, len(whole) // 9):
            (tmp_path / "x.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
            with pytest.raises(UserError), open_npz(tmp_path / "x.npz") as file:
                file.read("x")

    def test_an_encrypted_array(self, tmp_path):
        data = bytearray(write(tmp_path / "x.npz", header((1,)) + b"1234").read_bytes())
        data[data.index(b"PK\x01\x02") + 8] |= 1
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(UserError, match="encrypted"), open_npz(tmp_path / "x.npz") as file:
            file.read("x")

    def test_a_bomb(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(5):
                archive.writestr(f"{i}.npy", b"\0" * 2**26)
        message = r"would unpack from \d{3},\d{3} to 335,544,320 bytes: it is not read"
        with pytest.raises(UserError, match=message), open_npz(tmp_path / "x.npz"):
            pass

    def test_images_of_one_colour_are_no_bomb(self, tmp_path):
        np.savez_compressed(tmp_path / "x.npz", x=np.zeros((500, 64, 64, 3), np.uint8))
        with open_npz(tmp_path / "x.npz") as file:
            assert not file.read("x").any()

    @pytest.mark.parametrize("name", ["../../x.npy", "/etc/x.npy", "a\\..\\x.npy"])
    def test_names_are_names_and_no_paths(self, tmp_path, name):
        with open_npz(write(tmp_path / "x.npz", header((1,)) + b"1234", name=name)) as file:
            assert file.keys == (name.removesuffix(".npy"),)
            assert file.read(file.keys[0]).shape == (1,)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_name_twice(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("x.npy", header((1,)) + b"1234")
            archive.writestr("x", header((1,)) + b"5678")
        with pytest.raises(UserError, match="holds 'x' twice"), open_npz(tmp_path / "x.npz"):
            pass


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_is_finite(dtype):
    largest = ml_dtypes.finfo(dtype).max if dtype != np.float64 else 1e300
    assert is_finite(np.full(1000, largest, dtype))
    for odd in (np.nan, np.inf, -np.inf):
        array = np.ones((3, 4), dtype)
        array[1, 2] = odd
        assert not is_finite(array)


class TestMessages:
    def test_of_files_that_are_made_to_be_shown(self):
        message = str(UserError("no tensor '\x1b[2J\x07\u202e\ud800'\nsecond line ü"))
        assert message == "no tensor '\\x1b[2J\\x07\\u202e\\ud800'\nsecond line ü"
        message.encode()
        assert len(str(UserError("begin " + "x" * 10**6 + " end"))) < 5000

    def test_suggestions_among_very_many_and_very_long_names(self):
        start = time.process_time()
        assert did_you_mean("a" * 10**6, ["a" * 10**6]) == ""
        assert did_you_mean("abc", [*(f"name {i}" * 20 for i in range(100)), "abd"]) == "; did you mean 'abd'?"
        did_you_mean("layer/0/kernel", [f"layer/{i}/kernel" for i in range(10**6)])
        assert time.process_time() - start < 10


def test_json_of_strangers_is_what_json_says(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": [1, {"b": None}]}))
    assert read_json(tmp_path / "x.json") == {"a": [1, {"b": None}]}
