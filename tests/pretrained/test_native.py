import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig, ViT, ViTConfig
from surm_jax.preparation import Normalization, Preparation
from surm_jax.pretrained import image_preparation, load, model_config, save_model
from surm_jax.pretrained.position_embed import resize_position_embed

CONFIG = {
    "image_size": 8,
    "patch_size": 4,
    "width": 6,
    "depth": 1,
    "heads": 2,
    "mlp_width": 10,
    "num_classes": 3,
}


def config(**overrides):
    return ViTConfig(**{**CONFIG, **overrides})


def arrays(model):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def build(fresh=(), path=None, **overrides):
    return load(path, lambda: ViT(config(**overrides), rngs=nnx.Rngs(5)), fresh=fresh)


def random_model():
    """Return a model whose parameters, including those of the head, are random numbers from NumPy."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ViT(config(), rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    values = [
        (path, v.copy(jnp.asarray(rng.standard_normal(v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


@pytest.fixture
def saved(tmp_path):
    """The path of a model file, and the model that was saved in it."""
    model = random_model()
    save_model(tmp_path / "deep" / "vit.safetensors", model)
    return tmp_path / "deep" / "vit.safetensors", model


def test_round_trip_is_bit_exact(saved):
    path, model = saved
    loaded = arrays(build(path=path))
    assert loaded.keys() == arrays(model).keys()
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(loaded[name], array)
    assert [file.name for file in path.parent.iterdir()] == ["vit.safetensors"]  # No temporary file is left.


def test_head_is_fresh_by_default_even_if_its_shape_fits(saved):
    path, model = saved
    loaded = load(path, lambda: ViT(config(), rngs=nnx.Rngs(5)))
    assert not np.asarray(loaded.head.kernel[...]).any()
    np.testing.assert_array_equal(loaded.position_embed[...], model.position_embed[...])


def test_tensors_are_named_by_path_and_keep_their_dtype(tmp_path):
    model = random_model()
    model.norm.scale = nnx.Param(jnp.full(6, 1.5, jnp.bfloat16))
    save_model(tmp_path / "vit.safetensors", model)
    stored = load_file(tmp_path / "vit.safetensors")
    assert stored.keys() == arrays(model).keys()
    assert stored["norm/scale"].dtype == ml_dtypes.bfloat16
    assert stored["blocks/0/attention/query/kernel"].dtype == np.float32
    loaded = build(path=tmp_path / "vit.safetensors")
    np.testing.assert_array_equal(loaded.norm.scale[...], np.full(6, 1.5, np.float32))


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="disk full"):
        save_model(path, model)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_others_may_read_the_file(saved):
    path, _ = saved
    (path.parent / "plain").write_text("")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_suffix(saved, tmp_path):
    with pytest.raises(UserError, match=r"ends in '.safetensors', got .*vit\.npz"):
        save_model(tmp_path / "vit.npz", saved[1])


def test_another_geometry_names_the_fields(saved):
    with pytest.raises(UserError) as error:
        build(path=saved[0], width=8, pool="mean")
    assert "width is 6 in the file and 8 in the model" in str(error.value)
    assert "pool is 'token' in the file and 'mean' in the model" in str(error.value)
    assert "depth" not in str(error.value)


def test_another_model(saved):
    bert = BertConfig(vocab_size=5, width=6, depth=1, heads=2, mlp_width=10, max_positions=4, type_vocab_size=1)
    with pytest.raises(UserError, match="holds a model of ViTConfig, not of BertConfig"):
        load(saved[0], lambda: Bert(bert, rngs=nnx.Rngs(0)))


def test_fields_that_are_younger_than_the_file_have_their_defaults(saved):
    def alter(header, tensors):
        stored = json.loads(header["config"])
        header["config"] = json.dumps({name: stored[name] for name in CONFIG})

    rewrite(saved[0], alter)
    assert model_config(saved[0]) == (ViT, config())
    build(path=saved[0])
    with pytest.raises(UserError, match=r"epsilon is 1e-06 in the file and 0.1 in the model"):
        build(path=saved[0], epsilon=0.1)


def test_configuration_of_a_file(saved):
    assert model_config(saved[0]) == (ViT, config())
    assert model_config(saved[0], num_classes=9, dtype="bfloat16") == (ViT, config(num_classes=9, dtype="bfloat16"))
    with pytest.raises(UserError, match=r"ViTConfig has no field 'num_clases'.*did you mean 'num_classes'"):
        model_config(saved[0], num_clases=9)


def test_position_embeddings_are_resized_as_augregs_are(saved):
    path, model = saved
    loaded = build(path=path, image_size=20)
    expected = resize_position_embed(np.asarray(model.position_embed[...]), (1, 26, 6))
    np.testing.assert_array_equal(loaded.position_embed[...], expected)


def test_position_embeddings_with_a_distillation_token_are_resized(tmp_path):
    distilled = config(distillation=True)
    model = load(None, lambda: ViT(distilled, rngs=nnx.Rngs(5)))
    save_model(tmp_path / "vit.safetensors", model)
    larger = build(path=tmp_path / "vit.safetensors", distillation=True, image_size=20)
    embed = np.asarray(model.position_embed[...])
    np.testing.assert_array_equal(larger.position_embed[:, :2], embed[:, :2])
    plain = resize_position_embed(embed[:, 1:], (1, 26, 6))
    np.testing.assert_array_equal(larger.position_embed[:, 1:], plain)


def test_a_file_knows_how_images_were_prepared(saved):
    path, model = saved
    assert image_preparation(path) == Preparation()
    expected = Preparation(
        rgb=True,
        size={"shortest_edge": 8},
        resample=3,
        crop_size=(6, 6),
        normalization=Normalization((0.5, 0.25, 0.125), (1.0, 2.0, 3.0)),
    )
    save_model(path, model, preparation=expected)
    assert image_preparation(path) == expected
    build(path=path)
    # A config.json beside the file, which belongs to another model, has no effect.
    (path.parent / "config.json").write_text('{"model_type": "clip"}')
    assert image_preparation(path) == expected


@pytest.mark.parametrize("entry", ["[", "7", '{"image_std": 0}', '{"do_resize": 3}', "[" * 100_000])
def test_damaged_settings_of_images_are_told(saved, entry):
    rewrite(saved[0], lambda header, tensors: header.update(image_processor=entry))
    with pytest.raises(UserError, match=r"vit\.safetensors is damaged"):
        image_preparation(saved[0])


def test_a_header_of_an_older_version_is_told(saved):
    rewrite(saved[0], lambda header, tensors: header.update(normalization="[[0.1], [0.2]]"))
    with pytest.raises(UserError, match="older version"):
        image_preparation(saved[0])


def test_position_embeddings_of_a_half_precision_model_are_resized_to_it(saved):
    path, model = saved
    model.position_embed = nnx.Param(model.position_embed[...].astype(jnp.bfloat16))
    save_model(path, model)
    assert build(path=path, image_size=20, param_dtype="bfloat16").position_embed.dtype == jnp.bfloat16


def test_runtime_fields_may_differ(saved):
    assert build(path=saved[0], dtype="bfloat16", dropout=0.1).config.dtype == "bfloat16"


def test_classes_may_differ_only_if_the_head_is_fresh(saved):
    assert build(path=saved[0], fresh=("head/.*",), num_classes=9).head.kernel.shape == (6, 9)
    for fresh in ((), ("head/kernel",)):
        with pytest.raises(UserError, match="num_classes is 3 in the file and 9 in the model"):
            build(path=saved[0], fresh=fresh, num_classes=9)


def rewrite(path, alter):
    with safe_open(path, framework="numpy") as file:
        header, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    alter(header, tensors)
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda header, tensors: tensors.pop("norm/scale"), "no key fills 'norm/scale'"),
        (
            lambda header, tensors: tensors.update({"norm/skale": np.ones(1)}),
            "'norm/skale'.* did you mean 'norm/scale'",
        ),
        (lambda header, tensors: tensors.update({"cls_token": np.ones(2, "f4")}), r"'cls_token' has shape \(2,\)"),
        (lambda header, tensors: header.update(format="pt"), "not written by save_model"),
        (
            lambda header, tensors: header.update(model="ViTConfigs"),
            "of 'ViTConfigs'; known .*did you mean 'ViTConfig'",
        ),
        (lambda header, tensors: header.update(model="BertConfig"), "it holds no BertConfig"),
        (lambda header, tensors: header.update(config="{"), "header of .* is damaged"),
        (lambda header, tensors: header.update(config="{}"), "header of .* is damaged: .*missing .*'image_size'"),
        (lambda header, tensors: header.update(config="[]"), "header of .* is damaged"),
        (lambda header, tensors: header.update(config="[" * 100_000), "header of .* is damaged"),
        (
            lambda header, tensors: header.update(config=header["config"].replace('"depth": ', '"depth": 1000000')),
            "depth must be at most 128",
        ),
        (
            lambda header, tensors: header.update(config=header["config"].replace('_norm": true', '_norm": "no"')),
            "ViTConfig.final_norm must be True or False, got 'no'",
        ),
        (
            lambda header, tensors: header.update(config=header["config"].replace('"remat": "none"', '"remat": "no"')),
            "ViTConfig.remat must be one of .*, got 'no'",
        ),
        (
            lambda header, tensors: header.update(
                config=header["config"].replace('"channels": 3', '"channels": 1' + "0" * 400)
            ),
            "ViTConfig.channels must be at most 2147483648",
        ),
        (
            lambda header, tensors: header.update(
                config=header["config"].replace('"epsilon": 1e-06', '"epsilon": 1e999')
            ),
            "epsilon must be positive and finite, got inf",
        ),
        (
            lambda header, tensors: tensors["norm/scale"].fill(np.nan),
            "'norm/scale' holds numbers that are not finite",
        ),
        (
            lambda header, tensors: header.update(config=header["config"].replace("depth", "dept")),
            "unexpected .*'dept'",
        ),
        (lambda header, tensors: header.update(config=header["config"].replace("token", "tok")), "must be one of"),
    ],
)
def test_altered_files(saved, alter, message):
    rewrite(saved[0], alter)
    with pytest.raises(UserError, match=message) as error:
        build(path=saved[0])
    assert str(saved[0]) in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        build(path=path)
