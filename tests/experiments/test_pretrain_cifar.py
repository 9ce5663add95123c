"""Tests of the pretraining on five classes of CIFAR-10, with a tiny model and few random images."""

import json

import pytest

from experiments import pretrain_cifar
from surm_jax.errors import UserError
from surm_jax.models import ViTConfig
from surm_jax.pretrained import from_pretrained
from tests.experiments import tiny_cifar


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:config.model.checkpoint=none")
def test_it_writes_a_model_of_five_classes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ViTConfig.VARIANTS, "mini", tiny_cifar.GEOMETRY)
    monkeypatch.setattr(pretrain_cifar, "RESULTS", tmp_path / "results")
    arguments = [f"--data={tiny_cifar.write_data(tmp_path / 'tfds')}", "--epochs=3"]
    pretrain_cifar.main(arguments)
    model = from_pretrained(tmp_path / "runs" / "pretrain_cifar" / "model.safetensors")
    # The patches are 8 x 8 pixels, as the script sets them, although the tiny geometry that stands for the variant
    # "mini" has patches of 16 x 16.
    assert model.head.bias.shape == (5,)
    assert model.patch_embed.kernel.shape[-4:-2] == (8, 8)
    config = json.loads((tmp_path / "runs" / "pretrain_cifar" / "config.json").read_text())
    assert config["data"]["classes"] == ["airplane", "bird", "deer", "frog", "ship"]
    # Three passes over 40 images, 120 images in all, take two steps with batches of 64.
    text = pretrain_cifar.tables()["result"]
    assert "| 3 | 2 | " in text
    # The run is complete, so the same command does not train, and writes the same files again.
    pretrain_cifar.main(arguments)
    assert pretrain_cifar.tables()["result"] == text
    assert (tmp_path / "runs" / "pretrain_cifar" / "model.safetensors").is_file()


def test_the_classes_are_those_of_the_prepared_set(tmp_path):
    folder = str(tiny_cifar.write_data(tmp_path))
    learned = pretrain_cifar.classes_of(pretrain_cifar.LEARNED, folder)
    others = pretrain_cifar.classes_of(pretrain_cifar.OTHERS, folder)
    assert others == ("automobile", "cat", "dog", "horse", "truck")
    assert {*learned, *others} == set(tiny_cifar.CLASSES)


def test_without_the_data_it_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError, match=r"cifar10.*tfds build cifar10"):
        pretrain_cifar.main([f"--data={tmp_path}"])
    with pytest.raises(UserError, match="--epochs must be above 0, got 0"):
        pretrain_cifar.main([f"--data={tmp_path}", "--epochs=0"])
