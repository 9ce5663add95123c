from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import AUGREG_URLS, load, locate
from surm_jax.pretrained.download import cache_path
from surm_jax.pretrained.sources import is_folder


def test_none():
    assert locate("none", "B/16") is None


@pytest.mark.parametrize("variant", AUGREG_URLS)
def test_augreg_is_the_official_file_of_the_variant(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("SURM_JAX_CACHE", str(tmp_path))
    kept = cache_path(AUGREG_URLS[variant])
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert locate("augreg", variant) == kept
    assert locate(AUGREG_URLS[variant], "anything") == kept


def test_augreg_of_a_variant_without_one():
    with pytest.raises(UserError, match=r"of ViT 'mini'; the variants are \['B/16', .*'Ti/16'\]"):
        locate("augreg", "mini")
    with pytest.raises(UserError, match=r"augreg needs a variant; the variants are \['B/16', "):
        locate("augreg")


def test_digits(tmp_path, monkeypatch):
    shipped = tmp_path / "vit_digits.safetensors"
    monkeypatch.setattr("surm_jax.pretrained.sources.DIGITS_WEIGHTS", shipped)
    with pytest.raises(UserError, match=f"missing from this installation: {shipped}"):
        locate("digits", "digits")
    shipped.touch()
    assert locate("digits", "digits") == shipped


def test_path(tmp_path, monkeypatch):
    (tmp_path / "vit.npz").touch()
    assert locate(str(tmp_path / "vit.npz"), "B/16") == tmp_path / "vit.npz"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/vit.npz", "B/16") == tmp_path / "vit.npz"


def test_missing_path_lists_similar_files(tmp_path):
    (tmp_path / "vit_base.npz").touch()
    with pytest.raises(UserError, match=r"no checkpoint '.*vit_bas.npz'.*did you mean 'vit_base.npz'"):
        locate(str(tmp_path / "vit_bas.npz"), "B/16")
    with pytest.raises(UserError, match=f"not even the folder {tmp_path / 'absent'} exists"):
        locate(str(tmp_path / "absent" / "vit.npz"), "B/16")


def test_the_home_of_nobody():
    with pytest.raises(
        UserError, match=r"no checkpoint '~no-such-user/vit\.npz': no user of this machine has that name"
    ):
        locate("~no-such-user/vit.npz")


def test_folder(tmp_path):
    with pytest.raises(UserError, match=r"the folder holds no config\.json, .*: it is empty"):
        locate(str(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match=r"the folder holds no config\.json, .*: it holds adapter_config\.json"):
        locate(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert locate(str(tmp_path)) == tmp_path


def test_a_bare_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("google/vit-base-patch16-224", "google/vit-base-patch16-224@v1"):
        with pytest.raises(UserError, match=f"a model of the Hugging Face Hub is named 'hf://{name}'"):
            locate(name)
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "vit").touch()
    assert locate("google/vit") == Path("google/vit")


def test_a_known_name_is_no_folder_even_where_a_folder_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert not is_folder("digits") and is_folder("./digits")
    assert locate("digits").name == "vit_digits.safetensors"


def test_misspelt_path_beside_a_folder(tmp_path):
    (tmp_path / "vit_base").mkdir()
    with pytest.raises(UserError, match="did you mean 'vit_base'"):
        locate(str(tmp_path / "vit_bas"))


def test_misspelt_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'augreg'"):
        locate("augregg", "B/16")


@pytest.mark.exhaustive
def test_the_shipped_weights_are_small_and_know_the_digits_that_they_were_pretrained_on():
    path = locate("digits", "digits")
    assert path.stat().st_size <= 1_000_000
    config = ViTConfig.from_variant("digits", num_classes=20)
    model = load(path, lambda: ViT(config, rngs=nnx.Rngs(0)), fresh=())
    (batch,) = data.eval_batches(data.load("digits_0to4").test, batch_size=304, image_size=8)
    # The model was pretrained on rotated digits with the classes digit + 5 * quarter turns. These images are upright,
    # so their classes are the first five.
    right = np.asarray(model(batch["image"]))[:, :5].argmax(-1) == batch["label"]
    assert right[batch["mask"]].mean() > 0.95
