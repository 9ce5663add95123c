import dataclasses

import pytest

from surm_jax.record.inputs import keep_inputs
from surm_jax.tasks.config import DataConfig, ModelConfig
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import resolved


def places(folder, name="", checkpoint="none", where=""):
    """Return `data.name`, `model.checkpoint` and `data.dir` of a run after relative paths are resolved."""
    data, model = DataConfig(name=name, dir=where), ModelConfig(checkpoint=checkpoint)
    config = resolved(dataclasses.replace(RunConfig(), data=data, model=model), folder)
    return config.data.name, config.model.checkpoint, config.data.dir


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three folders: one with files of all kinds, an empty one, and that of a run."""
    for name in ("a/tfds", "a/weights", "b", "run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "my.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "a")
    return [tmp_path / name for name in ("a", "b", "run")]


def test_relative_places_become_absolute(folders):
    a, _, run = folders
    expected = (str(a / "my.npz"), str(a / "weights"), str(a / "tfds"))
    assert places(run, "my.npz", "weights", "tfds") == places(run, *expected) == expected


def test_names_and_missing_places_stay(folders):
    # Messages about a missing file then show it as it was written.
    *_, run = folders
    for names in (("digits", "digits", ""), ("cifar10", "hf://a/b", "gone"), ("gone.npz", "~nobody/w", "~nobody")):
        for name in ("digits", "cifar10"):
            (folders[0] / name).mkdir(exist_ok=True)
        assert places(run, *names) == names


def test_the_working_directory_comes_before_the_first_one(folders, monkeypatch):
    a, b, run = folders
    (run / "seed-3").mkdir()
    keep_inputs(run / "seed-3", {})
    monkeypatch.chdir(b)
    assert places(run, "my.npz")[0] == str(a / "my.npz")
    (b / "my.npz").write_bytes(b"")
    assert places(run, "my.npz")[0] == str(b / "my.npz")
