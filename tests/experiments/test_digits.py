"""Tests of the two experiments on digits, `pretrain_digits` and `digits_methods`, with few training steps or none."""

import numpy as np
import pytest
from flax import nnx

from configs import digits
from experiments import digits_methods, grid, pretrain_digits
from experiments.rows import Run, read_rows
from surm_jax import data
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import load


@pytest.mark.exhaustive
def test_pretraining_writes_weights_that_the_job_can_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "weights.safetensors"
    shipped.write_bytes(b"what adapters were trained on")
    monkeypatch.setattr(pretrain_digits, "DIGITS_WEIGHTS", shipped)
    pretrain_digits.main(["--steps=60"])
    assert shipped.read_bytes() == b"what adapters were trained on"
    arrays = np.load(tmp_path / "runs" / "pretrain_digits.npz")
    # The labels are those of five digits in four directions, and there are no other digits.
    assert set(arrays["train_labels"]) == set(arrays["test_labels"]) == set(range(20))
    assert len(arrays["train_images"]) == 4 * len(data.load("digits_0to4").train)
    config = ViTConfig.from_variant("digits", num_classes=5)
    written = tmp_path / "runs" / "pretrain_digits" / "model.safetensors"
    model = load(written, lambda: ViT(config, rngs=nnx.Rngs(0)))
    assert np.asarray(model.blocks[0].attention.query.kernel[...]).any()
    # The run is complete, so this command does not train. It replaces the file of weights in the package.
    pretrain_digits.main(["--steps=60", "--replace"])
    assert shipped.read_bytes() == written.read_bytes()


@pytest.mark.parametrize("experiment", [digits_methods, pretrain_digits])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--serach", 2)])
def test_help_and_a_mistyped_flag_start_no_runs(experiment, argument, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "train_run", None, raising=False)
    monkeypatch.setattr(grid, "work", None)
    with pytest.raises(SystemExit) as end:
        experiment.main([argument])
    assert end.value.code == status
    assert not [*tmp_path.iterdir()]
    said = capsys.readouterr()
    assert "usage" in (said.err if status else said.out)


@pytest.mark.parametrize(("part", "holdout"), [("search", 150), ("final", 0)])
def test_runs_are_those_of_the_job(part, holdout):
    config = digits_methods.config_of(Run("digits", "lora", part, 0.006, 3))
    assert (config.peft.method, config.seeds, config.optim.learning_rate["lora"]) == ("lora", (3,), 0.006)
    assert (config.data.holdout, config.optim.steps) == (holdout, 1500)


def test_the_job_has_the_rates_that_the_searches_chose():
    rows = read_rows(digits_methods.RESULTS / "digits_methods.csv")
    chosen = {method: digits_methods.GRID.best_rate(rows, "digits", method) for method in digits_methods.GRID.rates}
    rates = digits.get_config().optim.learning_rate
    assert chosen == {method: rates[method] for method in chosen}


def test_a_quarter_turn_is_one():
    images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    turned, labels = pretrain_digits.quarter_turns(images, np.array([1, 4]))
    assert labels.tolist() == [1, 4, 6, 9, 11, 14, 16, 19]
    assert turned[2, ..., 0].tolist() == [[1, 3], [0, 2]]
    np.testing.assert_array_equal(np.rot90(turned[6], axes=(0, 1)), images[0])


def test_tables_and_picture(tmp_path, monkeypatch, capsys):
    for suffix in (".csv", ".json"):
        (tmp_path / f"digits_methods{suffix}").write_bytes(
            (digits_methods.RESULTS / f"digits_methods{suffix}").read_bytes()
        )
    monkeypatch.setattr(digits_methods, "RESULTS", tmp_path)
    # All runs are finished, so the command trains nothing and reports, as with --report.
    digits_methods.main([])
    assert "| lora | 1,861 | 97.1 ± 0.7 |" in capsys.readouterr().out
    assert (tmp_path / "digits_methods.png").stat().st_size > 10_000
