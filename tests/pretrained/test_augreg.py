import pickle
import zipfile

import jax
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import AUGREG_URLS, load

KEY = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
POSITION = "Transformer/posembed_input/pos_embedding"


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def oracle(arrays, images, pool):
    """Return the logits of the published architecture, computed by NumPy in float64 from the arrays of the file."""
    a = {key: value.astype(np.float64) for key, value in arrays.items()}
    images = images.astype(np.float64)
    p = a["embedding/kernel"].shape[0]
    rows = []
    for top in range(0, images.shape[1], p):
        for left in range(0, images.shape[2], p):
            patch = images[:, top : top + p, left : left + p].reshape(len(images), -1)
            rows.append(patch @ a["embedding/kernel"].reshape(patch.shape[1], -1) + a["embedding/bias"])
    x = np.stack(rows, axis=1)
    if pool == "token":
        x = np.concatenate([np.repeat(a["cls"], len(images), axis=0), x], axis=1) + a[POSITION]
    else:
        x = x + a[POSITION][:, 1:]
    for i in range(1 + max(int(key.split("_")[1].split("/")[0]) for key in a if "encoderblock" in key)):
        b = f"Transformer/encoderblock_{i}/"
        y = layer_norm(x, a[b + "LayerNorm_0/scale"], a[b + "LayerNorm_0/bias"])
        m = b + "MultiHeadDotProductAttention_1/"
        out = np.zeros_like(x) + a[m + "out/bias"]
        for h in range(a[m + "query/kernel"].shape[1]):
            q, k, v = (y @ a[f"{m}{name}/kernel"][:, h] + a[f"{m}{name}/bias"][h] for name in ("query", "key", "value"))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out = out + weights / weights.sum(-1, keepdims=True) @ v @ a[m + "out/kernel"][h]
        x = x + out
        y = layer_norm(x, a[b + "LayerNorm_2/scale"], a[b + "LayerNorm_2/bias"])
        y = y @ a[b + "MlpBlock_3/Dense_0/kernel"] + a[b + "MlpBlock_3/Dense_0/bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ a[b + "MlpBlock_3/Dense_1/kernel"] + a[b + "MlpBlock_3/Dense_1/bias"]
    x = layer_norm(x, a["Transformer/encoder_norm/scale"], a["Transformer/encoder_norm/bias"])
    x = x[:, 0] if pool == "token" else x.mean(1)
    return x @ a["head/kernel"] + a["head/bias"]


@pytest.fixture
def read(tmp_path, augreg_arrays, tiny_geometry):
    """A function that writes a tiny ViT to an npz file, loads it, and returns the model and the arrays of the file.

    A test may pass a function that changes the arrays before they are written.
    """

    def read(alter=lambda arrays: None, fresh=(), **overrides):
        arrays = augreg_arrays(**tiny_geometry)
        alter(arrays)
        np.savez(tmp_path / "vit.npz", **arrays)
        config = ViTConfig(**{**tiny_geometry, **overrides})
        return load(tmp_path / "vit.npz", lambda: ViT(config, rngs=nnx.Rngs(0)), fresh=fresh), arrays

    return read


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_logits_equal_the_published_architecture(read, pool):
    model, arrays = read(pool=pool)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 12, 12, 3)).astype(np.float32)
    expected = oracle(arrays, images, pool)
    logits = jax.jit(lambda images: model(images))(images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_position_embeddings_are_resized_as_in_the_source(read):
    model, arrays = read(image_size=20)
    old = arrays[POSITION]
    grid = scipy.ndimage.zoom(old[0, 1:].reshape(3, 3, 15), (5 / 3, 5 / 3, 1), order=1)
    np.testing.assert_array_equal(model.position_embed[0, 0], old[0, 0])
    np.testing.assert_allclose(model.position_embed[0, 1:], grid.reshape(25, 15), rtol=1e-5, atol=1e-8)


def test_21k_head_and_pre_logits_are_left_out(read):
    def alter(arrays):
        arrays["head/kernel"], arrays["head/bias"] = np.ones((15, 99), np.float32), np.ones(99, np.float32)
        arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = np.ones((15, 15), np.float32), np.ones(15, np.float32)

    model, _ = read(alter, fresh=(r"head/.*",))
    assert model.head.kernel.shape == (15, 7)
    assert not np.asarray(model.head.kernel[...]).any()


def test_pre_logits_are_not_dropped_from_under_a_loaded_head(read):
    with pytest.raises(UserError, match="nothing reads the key 'pre_logits/kernel'"):
        read(lambda arrays: arrays.update({"pre_logits/kernel": np.ones((15, 15), np.float32)}))


def test_missing_key(read):
    with pytest.raises(UserError, match="no key fills 'blocks/1/mlp/up/kernel'") as error:
        read(lambda arrays: arrays.pop(KEY))
    # The message names the key of the same parameter in another block.
    assert "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel" in str(error.value)


def test_extra_key(read):
    extra = "Transformer/encoderblock_1/LayerNorm_1/scale"
    with pytest.raises(UserError, match=f"nothing reads the key {extra!r}; did you mean 'Transformer/encoderblock_1"):
        read(lambda arrays: arrays.update({extra: np.ones(15, np.float32)}))


def test_another_depth(read):
    with pytest.raises(UserError, match=r"encoderblock_1.* is for 'blocks/1/.*', which the model does not have"):
        read(depth=1)
    with pytest.raises(UserError, match=r"no key fills 'blocks/2/.*(\n.*)+and 8 more"):
        read(depth=3)


def test_all_shapes_in_one_error(read):
    def alter(arrays):
        arrays[KEY] = arrays[KEY].T
        arrays["cls"] = arrays["cls"][0]

    with pytest.raises(UserError) as error:
        read(alter)
    assert f"{KEY!r} has shape (22, 15), but 'blocks/1/mlp/up/kernel' is (15, 22)" in str(error.value)
    assert "'cls' has shape (1, 15), but 'cls_token' is (1, 1, 15)" in str(error.value)


def test_other_numerics_are_refused(read):
    with pytest.raises(UserError, match=r"activation is 'gelu_tanh' in such files and 'gelu' .*; epsilon is 1e-06 in"):
        read(activation="gelu", epsilon=1e-12)


def test_position_embeddings_that_are_no_grid(read):
    with pytest.raises(UserError, match=f"{POSITION!r} does not fit 'position_embed': 8 position embeddings are not"):
        read(lambda arrays: arrays.update({POSITION: np.ones((1, 8, 15), np.float32)}))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 10, 15), np.float32), rf"{POSITION!r} has shape \(2, 10, 15\), but 'position_embed' is \(1, 26,"),
        (np.ones((0, 10, 15), np.float32), rf"{POSITION!r} has shape \(0, 10, 15\), but"),
        (np.full((1, 10, 15), "one"), f"{POSITION!r} is <U3, which 'position_embed' of float32 cannot hold"),
    ],
    ids=["two", "none", "strings"],
)
def test_position_embeddings_that_are_none(read, array, message):
    with pytest.raises(UserError, match=message):
        read(lambda arrays: arrays.update({POSITION: array}), image_size=20)


def damaged(tmp_path, tiny_geometry, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as error:
        load(path, lambda: ViT(ViTConfig(**tiny_geometry), rngs=nnx.Rngs(0)))
    return str(error.value)


def test_truncated_and_altered_files(tmp_path, tiny_geometry, augreg_arrays):
    np.savez(tmp_path / "vit.npz", **augreg_arrays(**tiny_geometry))
    content = (tmp_path / "vit.npz").read_bytes()
    assert "cannot be read" in damaged(tmp_path, tiny_geometry, content[:-200])
    assert "cannot be read" in damaged(tmp_path, tiny_geometry, b"")
    at = content.find(b"embedding/bias.npy") + 180  # This position is inside the data of that array.
    assert "CRC" in damaged(tmp_path, tiny_geometry, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_pickles_are_refused(tmp_path, tiny_geometry, augreg_arrays):
    assert "pickled objects" in damaged(tmp_path, tiny_geometry, pickle.dumps({"cls": 1}))
    arrays = augreg_arrays(**tiny_geometry) | {"cls": np.array([{}], object)}
    np.savez(tmp_path / "objects.npz", **arrays)
    assert "pickled objects" in damaged(tmp_path, tiny_geometry, (tmp_path / "objects.npz").read_bytes())


def test_a_single_array_is_no_checkpoint(tmp_path, tiny_geometry):
    with (tmp_path / "single").open("wb") as file:
        np.save(file, np.ones(3))
    assert "a single array" in damaged(tmp_path, tiny_geometry, (tmp_path / "single").read_bytes())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice(tmp_path, tiny_geometry, augreg_arrays):
    np.savez(tmp_path / "vit.npz", **augreg_arrays(**tiny_geometry))
    with zipfile.ZipFile(tmp_path / "vit.npz", "a") as file:
        file.writestr("cls.npy", file.read("cls.npy"))
    message = damaged(tmp_path, tiny_geometry, (tmp_path / "vit.npz").read_bytes())
    assert "holds 'cls' twice" in message


def test_official_urls():
    assert {"Ti/16", "S/16", "B/16", "B/32", "L/16"} <= AUGREG_URLS.keys() <= ViTConfig.VARIANTS.keys()
    for variant, url in AUGREG_URLS.items():
        name = url.removeprefix("https://storage.googleapis.com/vit_models/augreg/")
        assert name.startswith(variant.replace("/", "_") + "-i21k-300ep-lr_0.001-")
        assert name.endswith("-do_0.0-sd_0.0.npz")
