"""Every file in configs/ builds, is valid, and trains two steps on small shapes, offline."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from surm_jax import data
from surm_jax.models import VARIANTS
from surm_jax.training.config import base_config, keys, parse
from surm_jax.training.modes import describe_run, train_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
SMALL_VIT = {"image_size": 16, "channels": 3, "patch_size": 8, "width": 12, "depth": 1, "heads": 3, "mlp_width": 24}
# What keeps the model small and the network out; everything else is as in the file.
SMALL = {
    "digits": {"data.holdout": 0},
    "vit_cifar": {"model.variant": "small", "model.checkpoint": "none", "data.holdout": 0},
}
# Sets of the data folder, by configuration: cut to so many test images.
ON_DISK = {"vit_cifar": 24}


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def test_every_configuration_is_tested():
    assert set(NAMES) == set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_has_every_key(name):
    config = get_config(name)
    parse(config)
    assert set(keys(config)) == set(keys(base_config()))
    # Each call gives one of its own.
    config.optim.steps = 1
    assert get_config(name).optim.steps != 1


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_has_the_command(name):
    module = importlib.import_module(f"configs.{name}")
    assert "python launch.py" in module.__doc__
    assert f"--config=configs/{name}.py" in module.__doc__ or name == "digits"


@pytest.mark.parametrize("name", NAMES)
def test_it_describes_what_it_trains(name, capsys):
    config = get_config(name)
    config.model.num_classes = config.model.num_classes or 5
    describe_run(parse(config))
    assert "trainable: " in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:config.model.checkpoint=none")
def test_two_steps(name, tmp_path, request, monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", SMALL_VIT)
    config = get_config(name)
    config.update_from_flattened_dict(
        {"data.batch_size": 8, "data.eval_batch_size": 8, "optim.steps": 2, "optim.warmup_ratio": 0.0, **SMALL[name]}
    )
    if name in ON_DISK:
        config.data.dir = str(request.getfixturevalue("shared") / "tfds")
        _cut_test_sets(monkeypatch, ON_DISK[name])
    result = train_run(parse(config), tmp_path / "run")
    assert result["steps"] == 2
    assert 0 <= result["metrics"]["test_accuracy"] <= 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def _cut_test_sets(monkeypatch, count):
    """Ten thousand images would take a minute."""
    load = data.load

    def load_few(*arguments):
        dataset = load(*arguments)
        _, few = data.hold_out(dataset.test, count)
        return dataclasses.replace(dataset, test=few)

    monkeypatch.setattr(data, "load", load_few)
