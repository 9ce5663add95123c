import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from surm_jax.errors import UserError
from surm_jax.pretrained import image_normalization
from surm_jax.pretrained.hf import ARCHITECTURES
from surm_jax.pretrained.normalization import CLIP, HALF, IMAGENET


@pytest.fixture
def folder(tmp_path):
    def make(model_type="vit", **preprocessor):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        if preprocessor:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return tmp_path

    return make


def test_the_folder_says_it(folder):
    given = image_normalization(folder("clip", image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]))
    assert given == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    weights = folder() / "model.safetensors"  # The path of a single file beside its config.json.
    save_file({}, weights)
    assert image_normalization(weights) == given


@pytest.mark.parametrize(("model_type", "expected"), [("vit", HALF), ("deit", IMAGENET), ("clip", CLIP)])
def test_without_a_word_it_is_that_of_the_kind_of_model(folder, model_type, expected):
    assert image_normalization(folder(model_type)) == expected


def test_every_model_of_images_has_one():
    for architecture in ARCHITECTURES.values():
        assert (architecture.normalization is not None) == (architecture.model.reads == "images")


def test_the_constants_are_those_of_transformers():
    reason = "compares with a PyTorch library: pip install -r requirements-peers.txt"
    constants = pytest.importorskip("transformers.image_utils", reason=reason)
    assert (tuple(constants.OPENAI_CLIP_MEAN), tuple(constants.OPENAI_CLIP_STD)) == CLIP
    assert (tuple(constants.IMAGENET_DEFAULT_MEAN), tuple(constants.IMAGENET_DEFAULT_STD)) == IMAGENET
    assert (tuple(constants.IMAGENET_STANDARD_MEAN), tuple(constants.IMAGENET_STANDARD_STD)) == HALF


def test_not_to_normalise(folder):
    assert image_normalization(folder("vit", do_normalize=False)) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},  # This scales to [-1, 1].
        {"rescale_factor": 0.01, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
        {"rescale_factor": 0.01, "do_normalize": False},
        {"do_normalize": False},
    ],
)
def test_it_is_what_the_processor_of_transformers_computes(folder, fields):
    reason = "compares with a PyTorch library: pip install -r requirements-peers.txt"
    processor = pytest.importorskip("transformers", reason=reason).ViTImageProcessor(**fields, do_resize=False)
    image = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    expected = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    mean, std = image_normalization(folder("vit", **fields))
    np.testing.assert_allclose((image / 255 - mean) / std, np.moveaxis(expected, 0, -1), rtol=1e-5, atol=1e-5)


def test_twice_the_factor(folder):
    fields = {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}
    assert image_normalization(folder("vit", **fields)) == HALF


def test_a_folder_that_names_the_processor_alone(folder):
    assert image_normalization(folder("clip", image_processor_type="CLIPImageProcessor")) == CLIP


def test_pixels_that_are_not_rescaled_are_refused(folder):
    with pytest.raises(UserError, match="do_rescale = false, so that pixels stay in"):
        image_normalization(folder("vit", do_rescale=False, image_mean=[127] * 3, image_std=[127] * 3))


def test_other_formats_have_none(tmp_path, folder):
    assert image_normalization(None) is None
    folder("clip")
    np.savez(tmp_path / "augreg.npz", cls=np.zeros(1))
    assert image_normalization(tmp_path / "augreg.npz") is None
    folder("bert")
    assert image_normalization(tmp_path) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_mean": [0.5], "image_std": [0.5, 0.5]},
        {"image_mean": [0.5], "image_std": [0.0]},
        {"image_mean": "a", "image_std": [1.0]},
        {"image_mean": [float("nan")], "image_std": [1.0]},
        {"image_mean": [10**400], "image_std": [1.0]},
        {"image_mean": [1.0], "image_std": [1.0], "rescale_factor": 0},
        {"image_mean": [1.0], "image_std": [1.0], "rescale_factor": -1},
        {"image_mean": [1.0], "image_std": [1.0], "rescale_factor": "a"},
    ],
)
def test_a_damaged_file_is_told(folder, fields):
    with pytest.raises(UserError, match=r"preprocessor_config\.json is damaged"):
        image_normalization(folder("vit", **fields))
