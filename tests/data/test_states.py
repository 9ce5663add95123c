import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from surm_jax import data
from surm_jax.data import States
from surm_jax.data import states as module
from surm_jax.data.states import read_rows, writing_rows


def write(path: Path, rows: np.ndarray) -> None:
    with writing_rows(path, rows.shape, rows.dtype) as place:
        place[...] = rows


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_are_read_as_they_were_written(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(dtype)
    write(tmp_path / "new" / "rows", rows)
    found = read_rows(tmp_path / "new" / "rows", rows.shape, rows.dtype)
    assert found is not None and found.dtype == rows.dtype
    np.testing.assert_array_equal(found, rows)
    assert read_rows(tmp_path / "absent", rows.shape, rows.dtype) is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[:9] + b"\1" + b[10:], lambda b: b[:-1], lambda b: b + b"0", lambda b: b""]
)
def test_a_damaged_file_is_named_and_removed(tmp_path, damage):
    path, rows = tmp_path / "rows", np.ones((4, 2), np.float32)
    write(path, rows)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        assert read_rows(path, rows.shape, rows.dtype) is None
    assert not path.exists()


def test_an_unfinished_file_is_removed(tmp_path):
    with pytest.raises(KeyError), writing_rows(tmp_path / "rows", (2,), np.dtype(np.float32)):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_the_files_that_were_used_last_stay(tmp_path, monkeypatch):
    rows = np.zeros(10, np.float32)
    for age, name in enumerate(("c", "b", "a")):
        write(tmp_path / name, rows)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    read_rows(tmp_path / "a", rows.shape, rows.dtype)
    (tmp_path / ".other.1f.tmp").write_bytes(b"another process writes this")
    monkeypatch.setattr(module, "MOST_BYTES", 3 * (rows.nbytes + 32) + 27)
    write(tmp_path / "d", rows)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "d", ".other.1f.tmp"}


def test_stored_states_come_in_the_order_of_the_images():
    pixels = np.arange(21, dtype=np.uint8)
    source = data.ArraySource(np.broadcast_to(pixels[:, None, None, None], (21, 4, 4, 1)), pixels % 3)
    states = States(pixels[:, None].astype(np.float32) / 127.5 - 1)
    plan = {"image_size": 4, "batch_size": 4, "process_count": 2, "process_index": 1}
    plain = data.train_batches(source, augment="none", seed=3, **plan)
    stored = data.train_batches(source, augment="none", seed=3, states=states, **plan)
    for _ in range(9):
        one, other = next(plain), next(stored)
        np.testing.assert_allclose(other["image"], one["image"][:, 0, 0], atol=1e-6)
        np.testing.assert_array_equal(other["label"], one["label"])
    assert plain.get_state() == stored.get_state()
    pairs = zip(data.eval_batches(source, **plan), data.eval_batches(source, states=states, **plan), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(other["image"], one["image"][:, 0, 0], atol=1e-6)
        for name in ("label", "mask", "index"):
            np.testing.assert_array_equal(other[name], one[name])


def test_stored_states_take_the_place_of_tokens():
    lengths = np.random.default_rng(0).integers(1, 9, 30)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1)
    source = data.TokenSource(tokens, np.zeros_like(tokens), offsets, np.arange(30) % 2, pad_token=0)
    states = States(np.stack([tokens, -tokens], axis=1).astype(np.float32), offsets)
    plan = {"lengths": (4, 8), "batch_size": 4, "process_count": 2, "process_index": 1}
    for make in (
        lambda **more: [next(data.text_train_batches(source, seed=1, **plan, **more)) for _ in range(9)],
        lambda **more: list(data.text_eval_batches(source, **plan, **more)),
    ):
        for one, other in zip(make(), make(states=states), strict=True):
            for sign, part in ((1, 0), (-1, 1)):
                np.testing.assert_array_equal(sign * other["tokens"][..., part], one["tokens"])
            for name in one.keys() - {"tokens"}:
                np.testing.assert_array_equal(other[name], one[name])
