import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from surm_jax.devices.mesh import put_base
from surm_jax.models import ViT, ViTConfig
from surm_jax.peft import fingerprint
from surm_jax.pretrained import load, save_model
from surm_jax.record.progress import Interruption
from surm_jax.training import loop, states
from surm_jax.training.config import RunConfig
from surm_jax.training.run import InterruptedRunError
from surm_jax.training.states import Frozen, with_states
from tests.training import tiny, tiny_text

PROBE = {"peft.method": "linear_probe"}
INSIDE = ("head/.*", "norm/.*", "blocks/1/norm1/.*")
LAST_VIT = {"peft.method": "lora", "peft.target": "blocks/2/attention/value", "peft.lora.dropout": 0.2}
LAST_BERT = {"peft.method": "bottleneck", "peft.target": "blocks/1/mlp"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for the files of states, which is empty before each test."""
    monkeypatch.setattr(states, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache" / states.FOLDER


@pytest.fixture(scope="module")
def images(tiny_files: Path) -> Callable[..., RunConfig]:
    """A function from values of the configuration to a job on images, with a ViT of three blocks."""

    def make(**values: Any) -> RunConfig:
        sizes = {name: values.get(f"model.{name}", size) for name, size in {**tiny.GEOMETRY, "depth": 3}.items()}
        weights = tiny_files / f"{sizes}.safetensors"
        if not weights.exists():
            vit = ViTConfig(**sizes, num_classes=3)
            save_model(weights, load(None, lambda: ViT(vit, rngs=nnx.Rngs(5))))
        common = {"model.depth": 3, "model.checkpoint": str(weights), "data.augment": "none"}
        return tiny.make_config(tiny_files, **{**common, **values})

    return make


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """A function from values of the configuration to a job on sentences, with a BERT of two blocks."""
    files = tmp_path_factory.mktemp("text")
    tiny_text.write_bert(files / "bert", dataclasses.replace(tiny_text.BERT, depth=2))
    tiny_text.write_task(files / "tfds", "rte", 0)
    return lambda **values: tiny_text.make_config(files, **values)


def run(config: RunConfig, workdir: Path) -> list[dict[str, Any]]:
    """Train with one seed, and return the logged metrics, without those that depend on the time."""
    with Interruption() as interruption:
        loop.train(config, config.seeds[0], workdir, interruption)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "examples_per_second"} for line in lines]


def exhaustive(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("images", PROBE),
        exhaustive("images", LAST_VIT),
        exhaustive("images", {**LAST_VIT, "model.dtype": "bfloat16", "model.scan_layers": True}),
        exhaustive("images", {**LAST_VIT, "mesh.data": 2, "mesh.fsdp": 4, "model.width": 64, "model.mlp_width": 256}),
        exhaustive("images", {**PROBE, "peft.train": INSIDE, "optim.accumulate": 2, "data.holdout": 9, "mesh.data": 4}),
        exhaustive("sentences", PROBE),
        exhaustive("sentences", LAST_BERT),
        exhaustive("sentences", {**PROBE, "peft.train": ("head/.*", "pooler/.*")}),
    ],
)
def test_losses_are_equal_with_stored_states(kind, values, request, tmp_path, capfd):
    values = {**values, "optim.steps": 5, "log.metrics_every": 1, "log.evaluate_every": 3, "optim.decay": "constant"}
    make = request.getfixturevalue(kind)
    plain = run(make(**values, **{"data.cache": "off"}), tmp_path / "off")
    assert "computed the frozen part" not in capfd.readouterr().err
    stored = run(make(**values), tmp_path / "auto")
    assert "computed the frozen part for 40 examples of train" in capfd.readouterr().err or "data.holdout" in values
    exact = values.get("model.dtype") != "bfloat16"
    for one, other in zip(plain, stored, strict=True):
        assert other == pytest.approx(one, rel=2e-5 if exact else 2e-2, abs=1e-6)
    # Another rate and another seed: no pass.
    run(make(**values, seeds=(1,), **{f"optim.learning_rate.{values['peft.method']}": 0.5}), tmp_path / "again")
    assert "computed the frozen part" not in capfd.readouterr().err


@pytest.fixture
def stored(images: Callable[..., RunConfig], folder: Path) -> Callable[..., Any]:
    """A function that stores states as a run does. It returns the names of the files and the task with the states."""

    @functools.cache
    def built(**values: Any) -> tiny.Built:
        return tiny.build(images(**{**PROBE, **values}))

    def store(
        check: Callable[[], None] = lambda: None, change: str = "", splits: tuple[str, ...] = ("test",), **values: Any
    ) -> Any:
        made = built(**values)
        base = fingerprint(made.frozen)
        if change:
            base[change] = "changed"
        with jax.set_mesh(made.job.mesh):
            frozen = put_base(made.frozen, made.job.mesh)
            optim, size = made.job.config.optim, made.job.config.data.batch_size
            model = Frozen(made.partition, made.trained, frozen, base)
            task, _ = with_states(made.job.task, model, made.job.mesh, optim.steps * size, check)
            for split in splits:
                task.states.get(split)
        return {path.name for path in folder.iterdir()} if folder.exists() else set(), task

    return store


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"data.augment": "affine"}, "data.augment=affine"),
        ({"model.dropout": 0.1}, "model.dropout=0.1"),
        ({"data.max_corrupt": 1}, "data.max_corrupt=1"),
        ({"optim.steps": 2}, "takes only 32 of 40 examples"),
        ({"peft.train": ("head/.*", "patch_embed/.*")}, ""),
        ({"peft.train": ("head/.*", "position_embed")}, ""),
        ({"peft.method": "lora", "peft.target": "qkv"}, ""),
    ],
    ids=str,
)
def test_nothing_is_stored_that_may_change_or_does_not_pay(stored, values, why, capfd):
    files, task = stored(**values)
    assert not files and not task.states
    assert why in (err := capfd.readouterr().err) and ("computed at every step" in err) == bool(why)


def test_nothing_is_stored_where_no_file_can_be_written(stored, folder, monkeypatch, capfd):
    folder.parent.write_text("This is a file.")
    assert not stored()[1].states and "cannot write" in capfd.readouterr().err
    monkeypatch.setattr(states, "MOST_BYTES", 100)
    assert not stored()[1].states and "more than 100" in capfd.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        {"change": "blocks/2/mlp/up/bias"},
        exhaustive({"data.name": "other.npz"}),
        exhaustive({"model.image_size": 12}),
        exhaustive({"model.dtype": "bfloat16"}),
        exhaustive({"peft.train": ("head/.*", "norm/.*")}),
    ],
    ids=str,
)
def test_a_file_belongs_to_base_data_and_settings(stored, tiny_files, tmp_path, monkeypatch, values):
    first, task = stored()
    assert len(first) == 2 and task.states["train"].rows.shape == (40, 10)
    assert stored(change="head/kernel")[0] == first
    monkeypatch.chdir(tmp_path)
    arrays = dict(np.load(tiny_files / "data.npz"))
    arrays["train_images"][3, 0, 0, 0] ^= 1
    np.savez("other.npz", **arrays)
    assert len(stored(**values)[0]) == 4


def test_a_damaged_file_is_computed_again(stored, folder, capfd):
    files, before = stored()
    rows = {split: found.rows.copy() for split, found in before.states.items()}
    for name in files:
        with (folder / name).open("r+b") as file:
            file.seek(11)
            file.write(b"\xff\xfe")
    capfd.readouterr()
    with pytest.warns(UserWarning, match="is damaged"):
        _, after = stored()
    assert "computed the frozen part" in capfd.readouterr().err
    for split, found in after.states.items():
        np.testing.assert_array_equal(found.rows, rows[split])


def test_a_split_is_computed_when_it_is_first_used(stored, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    assert len(stored(splits=())[0]) == 1 and "of test" not in capfd.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(states, "writing_rows", full)
        files, task = stored()
        assert len(files) == 1 and "of test" in (err := capfd.readouterr().err) and "No space left" in err
    files, again = stored()
    assert len(files) == 2
    np.testing.assert_array_equal(task.states["test"].rows, again.states["test"].rows)


def test_a_pass_that_is_stopped_leaves_no_file(stored):
    calls: Iterator[int] = iter(range(3))
    with pytest.raises(StopIteration):
        stored(check=lambda: next(calls))
    assert stored()[1].states.keys() == {"train", "test"}


@pytest.mark.exhaustive
def test_an_interrupted_run_with_states_ends_like_one_that_was_not(images, tmp_path, monkeypatch, folder):
    config = images(**PROBE, **{"optim.steps": 6, "log.metrics_every": 1})
    run(config, tmp_path / "whole")
    put, steps = loop.put_batch, 0

    def put_batch(*arguments):
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    monkeypatch.setattr(loop, "put_batch", put_batch)
    with pytest.raises(InterruptedRunError, match="saved step 3 of 6"):
        run(config, tmp_path / "parts")
    shutil.rmtree(folder)  # The states are computed again, with the same bits.
    run(config, tmp_path / "parts")
    tiny.assert_same_run(tmp_path / "whole", tmp_path / "parts")
