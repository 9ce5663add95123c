import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig, ViT, ViTConfig
from surm_jax.pretrained import from_pretrained, load, model_config, save_huggingface, save_model
from surm_jax.pretrained.hf import folder as huggingface

VIT = {
    "image_size": 8,
    "patch_size": 4,
    "width": 6,
    "depth": 1,
    "heads": 2,
    "mlp_width": 10,
    "num_classes": 3,
    "activation": "gelu",
    "epsilon": 1e-3,
}
ROBERTA = {
    "vocab_size": 7,
    "width": 6,
    "depth": 1,
    "heads": 2,
    "mlp_width": 10,
    "max_positions": 9,
    "type_vocab_size": 1,
    "num_classes": 3,
    "positions": "after_padding",
    "pad_token": 1,
}
KERNEL = "vit.encoder.layer.0.intermediate.dense.weight"


def random_model(model, config):
    """Return a model whose parameters, including those of the head, are random numbers from NumPy."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    values = [
        (path, v.copy(jnp.asarray(rng.standard_normal(v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def arrays(model):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def assert_same(one, other):
    assert arrays(one).keys() == arrays(other).keys()
    for path, array in arrays(one).items():
        np.testing.assert_array_equal(array, arrays(other)[path], err_msg=path)


@pytest.fixture(scope="module")
def vit():
    return random_model(ViT, ViTConfig(**VIT))


@pytest.fixture
def folder(tmp_path, vit):
    save_huggingface(tmp_path / "vit", vit)
    return tmp_path / "vit"


def read(path, fresh=(), **overrides):
    config = ViTConfig(**{**VIT, **overrides})
    return load(path, lambda: ViT(config, rngs=nnx.Rngs(5)), fresh=fresh)


def rewrite(folder, alter):
    """Change the weights of a folder by the function `alter`, which gets the dictionary of their arrays."""
    tensors = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def test_round_trip_is_bit_exact(folder, vit):
    assert_same(read(folder), vit)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert model_config(folder) == (ViT, vit.config)


def test_what_is_written_has_their_names_and_layout(folder, vit):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor(KERNEL), vit.blocks[0].mlp.up.kernel[...].T)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == ["ViTForImageClassification"]
    assert (fields["model_type"], fields["dtype"]) == ("vit", "float32")


def test_one_file_beside_its_configuration(folder, vit):
    path = (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert_same(read(path), vit)
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*, but other\.safetensors: pass one of"):
        read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"not written by save_model, and there is no .*config\.json"):
        read(path)


def test_our_own_file_in_their_folder(folder, vit):
    """Check that a file of `save_model` is recognised by its header, although a `config.json` lies beside it."""
    save_model(folder / "ours.safetensors", vit)
    assert_same(read(folder / "ours.safetensors"), vit)


def split_into_shards(folder, count):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    weight_map = {key: names[index % count] for index, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def test_shards(folder, vit):
    names = split_into_shards(folder, 3)
    assert_same(read(folder), vit)
    with pytest.raises(UserError, match=f"is one of several shards: pass the folder {folder} instead"):
        read(folder / names[0])
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=names[1]):
        read(folder)


def test_pickles_are_refused_with_what_to_do(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"but pytorch_model\.bin: that is a pickle.*save_pretrained"):
        read(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor .*; its files are config\.json"):
        read(folder)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda tensors: tensors.pop(KERNEL), "no key fills 'blocks/0/mlp/up/kernel'"),
        (
            lambda tensors: tensors.update({KERNEL.replace("mediate", "medium"): np.ones(1)}),
            f"nothing reads the key .*intermedium.*did you mean '{KERNEL}'",
        ),
        (
            lambda tensors: tensors.update({KERNEL.replace(".0.", ".1."): np.ones(1)}),
            "is for 'blocks/1/mlp/up/kernel', which the model does not have",
        ),
        (
            lambda tensors: tensors.update({KERNEL: np.ones((6, 10), np.float32)}),
            rf"'{KERNEL}' does not fit 'blocks/0/mlp/up/kernel': it has shape \(6, 10\), not \(10, 6\)",
        ),
        (
            lambda tensors: tensors.update({KERNEL.removeprefix("vit."): tensors[KERNEL]}),
            "'blocks/0/mlp/up/kernel' is filled by .* and by ",
        ),
        (lambda tensors: tensors.update({KERNEL: np.ones((10, 6), np.int32)}), "is int32, which"),
    ],
)
def test_strict_both_ways(folder, alter, message):
    rewrite(folder, alter)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert str(error.value).startswith(f"{folder} does not fit the model:")


def test_the_configuration_is_compared_before_anything_is_read(folder):
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        read(folder, width=8, activation="gelu_tanh")
    assert "width is 6 in the file and 8 in the model" in str(error.value)
    assert "activation is 'gelu' in the file and 'gelu_tanh' in the model" in str(error.value)
    assert "depth" not in str(error.value)
    with pytest.raises(UserError, match="is damaged"):
        read(folder)


def test_what_may_differ(folder, vit):
    assert read(folder, dropout=0.1, dtype="bfloat16", remat="block").config.remat == "block"
    assert read(folder, fresh=("head/.*",), num_classes=9).head.kernel.shape == (6, 9)
    larger = read(folder, image_size=16)
    assert larger.position_embed.shape == (1, 17, 6)
    np.testing.assert_array_equal(larger.position_embed[0, 0], vit.position_embed[0, 0])
    with pytest.raises(UserError, match="num_classes is 3 in the file and 9 in the model"):
        read(folder, num_classes=9)


def test_another_kind_of_model(folder):
    bert = BertConfig(**ROBERTA)
    with pytest.raises(UserError, match="holds a model of ViTConfig, not of BertConfig"):
        load(folder, lambda: Bert(bert, rngs=nnx.Rngs(0)))


def test_half_precision_files(folder, vit):
    for dtype in (np.float16, jnp.bfloat16):
        rounded = {}

        def alter(tensors, rounded=rounded, dtype=dtype):
            rounded.update({key: array.astype(dtype) for key, array in tensors.items()})
            tensors.update(rounded)

        rewrite(folder, alter)
        kernel = read(folder).blocks[0].mlp.up.kernel[...]
        assert kernel.dtype == jnp.float32
        np.testing.assert_array_equal(kernel.T, rounded[KERNEL].astype(np.float32))


def test_a_bfloat16_model_of_float32_files(folder, vit):
    model = read(folder, param_dtype="bfloat16")
    kernel = model.blocks[0].mlp.up.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, vit.blocks[0].mlp.up.kernel[...].astype(jnp.bfloat16))
    np.testing.assert_array_equal(model.norm.scale[...], vit.norm.scale[...])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ('{"model_type": "vits"}', "says model_type = 'vits'; known are .*did you mean 'vit'"),
        ("{}", "says model_type = None; known are"),
        ('{"model_type": ["vit"]}', "says model_type"),
        ('{"model_type": "vit", "hidden_size": "6"}', "hidden_size = '6'"),
        ('{"model_type": "roberta", "hidden_size": "6"}', "6"),
        ('{"model_type": "roberta", "id2label": 6}', r"the config\.json of .* is damaged"),
        ('{"model_type": "vit", "num_hidden_layers": 1000000000}', "depth must be at most 128, got 1000000000"),
        ('{"model_type": "dinov2", "mlp_ratio": Infinity}', r"the config\.json of .* is damaged"),
        ('{"model_type": "vit", "model_type": "vit"}', "has 'model_type' twice"),
    ],
)
def test_damaged_configurations(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        model_config(folder)
    assert str(folder) in str(error.value)


def test_overrides(folder):
    assert model_config(folder, num_classes=9, image_size=16)[1] == ViTConfig(
        **{**VIT, "num_classes": 9, "image_size": 16}
    )
    with pytest.raises(UserError, match=r"ViTConfig has no field 'drop_out'.*did you mean 'dropout'"):
        model_config(folder, drop_out=0.1)


def test_from_pretrained(folder, vit):
    assert_same(from_pretrained(folder), vit)
    model = from_pretrained(str(folder), num_classes=9, dtype="bfloat16")
    assert model.head.kernel.shape == (6, 9)
    np.testing.assert_array_equal(model.norm.scale[...], vit.norm.scale[...])


def test_a_new_task_has_both_layers_of_robertas_classifier_anew(tmp_path):
    roberta = random_model(Bert, BertConfig(**ROBERTA))
    save_huggingface(tmp_path / "roberta", roberta)
    model = from_pretrained(tmp_path / "roberta", num_classes=5)
    assert not np.allclose(model.pooler.kernel[...], roberta.pooler.kernel[...])
    np.testing.assert_array_equal(model.embed_norm.scale[...], roberta.embed_norm.scale[...])
    # Checkpoints of RoBERTa's masked language model have neither layer of the classifier.
    rewrite(tmp_path / "roberta", lambda tensors: [tensors.pop(key) for key in [*tensors] if "classifier" in key])
    assert from_pretrained(tmp_path / "roberta", num_classes=5).head.kernel.shape == (6, 5)
    with pytest.raises(
        UserError, match=r"no key fills 'pooler/kernel'(\n.*)*\n  \(parameters that match `fresh`, such as"
    ):
        from_pretrained(tmp_path / "roberta", num_classes=5, fresh=("head/.*",))


def test_norms_under_the_names_of_tensorflow(tmp_path):
    """Read a checkpoint in the style of `google-bert/bert-base-uncased`.

    Its names have a prefix, its norms have the arrays gamma and beta, and it has the heads of pretraining.
    """
    config = BertConfig.from_variant("tiny", vocab_size=20, width=8, heads=2, mlp_width=8, depth=2)
    model = random_model(Bert, config)
    save_huggingface(tmp_path / "bert", model)

    def age(tensors):
        old = {}
        for name, array in tensors.items():
            name = name if name.startswith(("bert.", "classifier.")) else f"bert.{name}"
            if "LayerNorm" in name:
                name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            if not name.startswith("classifier."):
                old[name] = array
        assert sum(name.endswith((".gamma", ".beta")) for name in old) == 2 * (1 + 2 * 2)
        zeros = {"cls.predictions.transform.LayerNorm.gamma": 8, "cls.seq_relationship.bias": 2}
        tensors.clear()
        tensors.update(old, **{name: np.zeros(size, np.float32) for name, size in zeros.items()})

    rewrite(tmp_path / "bert", age)
    read, expected = arrays(load(tmp_path / "bert", lambda: Bert(config, rngs=nnx.Rngs(3)))), arrays(model)
    assert [path for path in expected if not np.array_equal(read[path], expected[path])] == ["head/bias", "head/kernel"]


def test_labels(tmp_path, vit):
    save_huggingface(tmp_path / "vit", vit, labels=["cat", "dog", "owl"])
    fields = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert fields["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    assert fields["label2id"] == {"cat": 0, "dog": 1, "owl": 2}
    assert model_config(tmp_path / "vit") == (ViT, vit.config)
    for labels, message in ((["cat"], "3 classes, but there are 1 labels"), (["a", "b", "a"], "got 'a' 2 times")):
        with pytest.raises(UserError, match=message):
            save_huggingface(tmp_path / "other", vit, labels=labels)
    assert not (tmp_path / "other").exists()


def test_norms_of_a_bfloat16_model_are_not_rounded_on_their_side(tmp_path):
    model = random_model(ViT, ViTConfig(**VIT, param_dtype="bfloat16"))
    save_huggingface(tmp_path / "vit", model)
    stored = load_file(tmp_path / "vit" / "model.safetensors")
    assert (stored[KERNEL].dtype, stored["vit.layernorm.weight"].dtype) == (jnp.bfloat16, jnp.float32)
    # `from_pretrained` of transformers casts all arrays to the dtype in config.json.
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["dtype"] == "float32"
    assert_same(read(tmp_path / "vit", param_dtype="bfloat16"), model)


def test_only_a_model_is_replaced(folder, vit):
    save_huggingface(folder, vit, labels=["a", "b", "c"])
    assert "a" in (folder / "config.json").read_text()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes\.txt', which does not belong to a model"):
        save_huggingface(folder, vit)
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        save_huggingface(folder / "notes.txt", vit)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_folder(folder, vit, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface, "write_tensors", fail)
    with pytest.raises(UserError, match="disk full"):
        save_huggingface(folder, vit, labels=["a", "b", "c"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["vit"]


def described_by(model, config):
    """Return a copy of a model with the same parameters and another configuration."""
    model = nnx.clone(model)
    model.config = config
    return model


def test_what_is_saved_must_be_the_model_of_the_configuration(tmp_path, vit):
    for changes, message in (
        ({"depth": 2}, "lacks 'blocks/1/"),
        ({"layer_scale": True, "pool": "token+patches", "mlp_width": 12}, "lacks 'blocks/0/scale"),
        ({"qkv_bias": False}, "has 'blocks/0/attention/key/bias', which a ViTConfig does not describe: .*merge"),
        ({"mlp_width": 12}, r"'blocks/0/mlp/.*' has shape \(10.*, but its configuration says \(12"),
    ):
        with pytest.raises(UserError, match=message):
            save_huggingface(tmp_path / "vit", described_by(vit, ViTConfig(**{**VIT, **changes})))
    with pytest.raises(UserError, match="transformers has no such ViT"):
        save_huggingface(tmp_path / "vit", described_by(vit, ViTConfig(**VIT, pre_norm=True)))
    assert not (tmp_path / "vit").exists()
