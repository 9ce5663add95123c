"""Tests that a model outside the package (`own_model.py`) can be read, written and trained like ours."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.models import model_of_variant
from surm_jax.peft import load_adapter
from surm_jax.pretrained import (
    from_pretrained,
    huggingface_names,
    image_normalization,
    load,
    model_config,
    save_huggingface,
    save_model,
)
from surm_jax.training.modes import train_run
from surm_jax.training.parsing import base_config, parse
from tests.pretrained.own_model import GREY, PatchMixer, PatchMixerConfig

FIELDS = {
    "model_type": "patch_mixer",
    "image_size": 8,
    "num_channels": 1,
    "patch": 4,
    "hidden_size": 6,
    "num_layers": 2,
    "num_labels": 3,
}
SHAPES = {
    "body.embed.weight": (6, 1, 4, 4),
    "body.embed.bias": (6,),
    "body.mixer.0.dense.weight": (6, 6),
    "body.mixer.0.dense.bias": (6,),
    "body.mixer.1.dense.weight": (6, 6),
    "body.mixer.1.dense.bias": (6,),
    "classifier.weight": (3, 6),
    "classifier.bias": (3,),
}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def oracle(tensors, images):
    """Return the logits of the model with these arrays, computed by NumPy in float64."""
    a = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    patches = images.astype(np.float64)[..., 0].reshape(len(images), 2, 4, 2, 4).transpose(0, 1, 3, 2, 4)
    x = patches.reshape(len(images), 4, 16) @ a["body.embed.weight"].reshape(6, 16).T + a["body.embed.bias"]
    for layer in range(2):
        y = x @ a[f"body.mixer.{layer}.dense.weight"].T + a[f"body.mixer.{layer}.dense.bias"]
        x = x + np.maximum(y, 0)
    return x.mean(1) @ a["classifier.weight"].T + a["classifier.bias"]


def test_a_folder_is_read(folder):
    model = from_pretrained(folder)
    assert isinstance(model, PatchMixer)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    expected = oracle(load_file(folder / "model.safetensors"), images)
    np.testing.assert_allclose(model(images), expected, rtol=1e-5, atol=1e-5)
    assert image_normalization(folder) == GREY


def test_a_folder_is_written_as_it_was_read(folder, tmp_path):
    model = from_pretrained(folder)
    save_huggingface(tmp_path / "written", model)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "written"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert model_config(tmp_path / "written") == model_config(folder)
    assert huggingface_names(model.config).modules("blocks/1/dense") == ("body.mixer.1.dense",)


def test_a_file_of_our_own_is_written_and_read(folder, tmp_path):
    model = from_pretrained(folder)
    save_model(tmp_path / "mixer.safetensors", model)
    again = from_pretrained(tmp_path / "mixer.safetensors")
    for (path, one), (_, other) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))


def test_a_new_head(folder):
    model = from_pretrained(folder, num_classes=7)
    assert model.head.kernel.shape == (6, 7)
    np.testing.assert_array_equal(
        model.blocks[0].dense.kernel[...], from_pretrained(folder).blocks[0].dense.kernel[...]
    )


def test_mistakes_are_told_as_for_our_models(folder):
    with pytest.raises(UserError, match=r"PatchMixerConfig has no field 'witdh'.*did you mean 'width'"):
        from_pretrained(folder, witdh=3)
    config = PatchMixerConfig(num_classes=3, depth=3)
    with pytest.raises(UserError, match="depth is 2 in the file and 3 in the model"):
        load(folder, lambda: PatchMixer(config, rngs=nnx.Rngs(0)))
    tensors = load_file(folder / "model.safetensors")
    tensors["body.mixer.0.dense.wieght"] = tensors.pop("body.mixer.0.dense.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"nothing reads the key 'body\.mixer\.0\.dense\.wieght'; did you mean"):
        from_pretrained(folder)


def test_it_is_trained_in_a_task(folder, tmp_path):
    config = base_config()
    config.update_from_flattened_dict(
        {
            "model.variant": "",
            "model.checkpoint": str(folder),
            "data.name": "digits_5to9",
            "data.augment": "none",
            "data.train_examples": 16,
            "data.batch_size": 8,
            "peft.method": "lora",
            "optim.steps": 2,
            "optim.warmup_ratio": 0.0,
        }
    )
    result = train_run(parse(config), tmp_path / "run")
    assert result["steps"] == 2
    base = from_pretrained(folder, num_classes=5)
    model, adapter = load_adapter(tmp_path / "run" / "adapter", base)
    assert [rule.target for rule in adapter.rules] == [PatchMixer.adapter_targets["qkv"]]
    # One of the two factors starts at zero, so it has non-zero entries only if it was trained.
    tensors = model.blocks[1].dense.delta["default"].tensors()
    assert all(np.asarray(tensor[...]).any() for tensor in tensors.values())


def test_it_has_a_variant():
    assert model_of_variant("patch-mixer", "images") is PatchMixer
    assert PatchMixerConfig.from_variant("patch-mixer", num_classes=2).width == 8
