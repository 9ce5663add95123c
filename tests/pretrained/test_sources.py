import pytest

from surm_jax.errors import UserError
from surm_jax.pretrained import AUGREG_URLS, locate
from surm_jax.pretrained.download import cache_path


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
    with pytest.raises(UserError, match=r"of ViT 'mini'; there is one of \['B/16', 'S/16', 'Ti/16'\]"):
        locate("augreg", "mini")


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
    with pytest.raises(UserError, match=r"it is a folder, with the files vit_base\.npz"):
        locate(str(tmp_path), "B/16")


def test_misspelt_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'augreg'"):
        locate("augregg", "B/16")
