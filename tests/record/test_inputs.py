import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.record import inputs as record
from surm_jax.record.inputs import check_inputs, check_recorded_files, describe_files, keep_inputs, read_inputs


def write_set(folder, **changes):
    """Write two files, which together are one input of a run, into a new folder, and return their paths."""
    folder.mkdir()
    for name, content in {"features": "{}", "train": "0123456789", **changes}.items():
        (folder / name).write_text(content)
    return [folder / "train", folder / "features"]


def test_the_content_is_compared_and_not_the_place(tmp_path):
    one, other = write_set(tmp_path / "one"), write_set(tmp_path / "other")
    described = describe_files(one)
    digest = hashlib.sha256(b"0123456789").hexdigest()[:16]
    assert described["path"] == str(tmp_path / "one")
    assert described["content"].keys() == {"features", "train"}
    assert described["content"]["train"] == f"10 bytes, SHA-256 {digest}"
    assert describe_files(other)["content"] == described["content"]
    assert describe_files(one[:1]) == {"path": str(one[0]), "content": f"10 bytes, SHA-256 {digest}"}
    one[0].write_text("012345678X")
    assert describe_files(one)["content"] != described["content"]
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'gone'}: No such file"):
        describe_files([tmp_path / "gone"])


def test_a_relative_path_is_recorded_as_an_absolute_one(tmp_path, monkeypatch):
    write_set(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    assert describe_files([Path("one/train")])["path"] == str(tmp_path / "one" / "train")


def test_a_large_set_is_known_by_sizes_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "LARGEST_WHOLE", 10**6)
    rng, described = np.random.default_rng(0), []
    images = rng.integers(0, 256, (2**21,), np.uint8)
    for index in (0, 1):
        images[len(images) // 2] += 1
        np.savez(tmp_path / f"{index}.npz", images=images)
        described.append(describe_files([tmp_path / f"{index}.npz"])["content"])
    # The checksums of the arrays are at the end of the file. So a change in the middle of an array is noticed, too.
    assert described[0].startswith("2,097,") and "both ends" in described[0] and described[0] != described[1]
    # A small file of a large set counts whole.
    (tmp_path / "labels.txt").write_text("cat")
    assert "ends" not in describe_files([tmp_path / "0.npz", tmp_path / "labels.txt"])["content"]["labels.txt"]


def test_what_changed_is_named_with_both_places(tmp_path):
    inputs = {"label names": {"0": "cat"}, "data": describe_files(write_set(tmp_path / "one")), "weights": 1}
    assert keep_inputs(tmp_path, inputs) == read_inputs(tmp_path) == {"started in": str(Path.cwd()), **inputs}
    other = {
        "label names": {"0": "dog"},
        "data": describe_files(write_set(tmp_path / "other", train="X")),
        "weights": 2,
    }
    before = (tmp_path / "inputs.json").read_bytes()
    with pytest.raises(UserError) as error:
        keep_inputs(tmp_path, other)
    message = str(error.value)
    assert f"the run in {tmp_path} has read something else: there label names.0 is 'cat', here 'dog'; " in message
    assert "data.train is '10 bytes" in message and f"({tmp_path / 'one'}, here {tmp_path / 'other'})" in message
    assert "--config.data.name" in message and "features" not in message and "weights" not in message
    assert "\n" not in message and (tmp_path / "inputs.json").read_bytes() == before
    # A subset of the inputs can be checked, as predictions do.
    check_inputs(tmp_path, read_inputs(tmp_path), {"label names": {"0": "cat"}})


def test_a_moved_set_gets_its_new_place(tmp_path):
    keep_inputs(tmp_path, {"data": describe_files(write_set(tmp_path / "one"))})
    shutil.move(tmp_path / "one", tmp_path / "other")
    keep_inputs(tmp_path, {"data": describe_files([tmp_path / "other" / name for name in ("train", "features")])})
    assert read_inputs(tmp_path)["data"]["path"] == str(tmp_path / "other")


def test_a_changed_plugin_is_only_a_warning(tmp_path):
    keep_inputs(tmp_path, {"plugin mine": {"path": "/mine.py", "content": "1"}})
    with pytest.warns(UserWarning, match=r"another version of the plugin mine is '1', here '2' \(/mine\.py\)"):
        keep_inputs(tmp_path, {"plugin mine": {"path": "/mine.py", "content": "2"}})


def test_a_run_without_its_record_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "checkpoint.json").write_text("{}")
    with pytest.raises(UserError, match=r"inputs\.json is missing, .*another --workdir"):
        keep_inputs(tmp_path, {})
    for damage in ("{", "[]"):
        (tmp_path / "inputs.json").write_text(damage)
        with pytest.raises(UserError, match=r"inputs\.json is damaged"):
            keep_inputs(tmp_path, {})
    (tmp_path / "inputs.json").write_text(json.dumps({"data": 3}))
    with pytest.raises(UserError, match="something else"):
        keep_inputs(tmp_path, {"data": {"path": "/a", "content": "1"}})


def test_recorded_files_may_be_gone_but_not_changed(tmp_path):
    files = write_set(tmp_path / "one")
    keep_inputs(
        tmp_path, {"data": describe_files(files), "model": {"depth": 1}, "tokenizer": describe_files(files[:1])}
    )
    check_recorded_files(tmp_path)
    files[0].write_text("other")
    with pytest.raises(UserError, match=r"data\.train is .*; tokenizer is '10 bytes"):
        check_recorded_files(tmp_path)
    files[0].unlink()
    check_recorded_files(tmp_path)
