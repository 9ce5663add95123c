"""The two digits experiments, cut short."""

import csv

import numpy as np
import pytest
from flax import nnx

from experiments import digits_methods, pretrain_digits
from surm_jax import data
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import load


def test_pretraining_writes_weights_that_the_job_can_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "weights.safetensors"
    shipped.write_bytes(b"what adapters were trained on")
    monkeypatch.setattr(pretrain_digits, "DIGITS_WEIGHTS", shipped)
    pretrain_digits.main(["--steps=60"])
    assert shipped.read_bytes() == b"what adapters were trained on"
    arrays = np.load(tmp_path / "runs" / "pretrain_digits.npz")
    # Five digits in four directions, and nothing of the others.
    assert set(arrays["train_labels"]) == set(arrays["test_labels"]) == set(range(20))
    assert len(arrays["train_images"]) == 4 * len(data.load("digits_0to4").train)
    config = ViTConfig.from_variant("digits", num_classes=5)
    written = tmp_path / "runs" / "pretrain_digits" / "model.safetensors"
    model = load(lambda: ViT(config, rngs=nnx.Rngs(0)), written)
    assert np.asarray(model.blocks[0].attention.query.kernel[...]).any()
    # The run is complete, and only the file is to be replaced.
    pretrain_digits.main(["--steps=60", "--replace"])
    assert shipped.read_bytes() == written.read_bytes()


@pytest.mark.parametrize("experiment", [digits_methods, pretrain_digits])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--serach", 2)])
def test_help_and_a_mistyped_flag_start_no_runs(experiment, argument, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "train_run", None)
    with pytest.raises(SystemExit) as end:
        experiment.main([argument])
    assert end.value.code == status
    assert not [*tmp_path.iterdir()]
    said = capsys.readouterr()
    assert "usage" in (said.err if status else said.out)


def test_the_search_knows_a_rate_for_every_method(tmp_path, monkeypatch):
    asked = []

    def read_metrics(folder):
        return [{"holdout_accuracy": 0.5}]

    monkeypatch.setattr(digits_methods, "RESULTS", tmp_path)
    monkeypatch.setattr(digits_methods, "read_metrics", read_metrics)
    monkeypatch.setattr(digits_methods, "train_run", lambda config, workdir: asked.append(config))
    digits_methods.main(["--search"])
    rates = {}
    for config in asked:
        assert config.data.holdout == 150
        rates.setdefault(config.peft.method, []).append(config.optim.learning_rate[config.peft.method])
    assert [*rates] == ["linear_probe", "lora", "circulant", "full"]
    np.testing.assert_allclose(rates["circulant"], [3e-3, 1e-2, 3e-2])
    np.testing.assert_allclose(rates["lora"], [6e-3, 2e-2, 6e-2])
    assert (tmp_path / "digits_search.md").read_text().count("| 50.0 % |") == 12


def test_a_quarter_turn_is_one():
    images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    turned, labels = pretrain_digits.quarter_turns(images, np.array([1, 4]))
    assert labels.tolist() == [1, 4, 6, 9, 11, 14, 16, 19]
    assert turned[2, ..., 0].tolist() == [[1, 3], [0, 2]]
    np.testing.assert_array_equal(np.rot90(turned[6], axes=(0, 1)), images[0])


def test_tables_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_methods, "RESULTS", tmp_path)
    results = {
        method: {
            "seeds": [0, 1, 2],
            "parameters": {"trainable": trainable, "total": 2000},
            "metrics": {"test_accuracy": {"mean": 0.9, "std": 0.01, "seeds": [0.89, 0.9, 0.91]}},
            "adapter_bytes": 5120,
        }
        for method, trainable in (("lora", 100), ("full", 2000))
    }
    digits_methods.write_tables(results)
    digits_methods.draw(results)
    rows = list(csv.DictReader((tmp_path / "digits_methods.csv").open()))
    assert [(row["method"], row["seed"], float(row["test_accuracy"])) for row in rows[:2]] == [
        ("lora", "0", 0.89),
        ("lora", "1", 0.9),
    ]
    assert "| lora | 100 | 5.00 % | 90.0 ± 1.0 % | 5.1 kB |" in (tmp_path / "digits_methods.md").read_text()
    assert (tmp_path / "digits_methods.png").stat().st_size > 10_000
