"""Tests of the architectures of Vision Transformers that need no PyTorch.

tests/models/test_vit_peers.py compares the models with those of transformers.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained.hf import ARCHITECTURES, architecture_of
from tests.pretrained.hf.hf_trees import read_tree, written_tree

TINY = {"image_size": 8, "patch_size": 4, "channels": 2, "width": 12, "depth": 2, "heads": 3, "mlp_width": 24}
CLIP = {"pre_norm": True, "patch_bias": False}

# The fields of `ViTConfig` that are the same in all models of each `model_type`, where they differ from the default.
FIELDS = {
    "vit": {},
    "deit": {"distillation": True},
    "ijepa": {"pool": "mean"},
    "dinov2": {"pool": "token+patches", "layer_scale": True},
    "clip": {**CLIP, "pool": "patches", "final_norm": False},
    "clip_vision_model": {**CLIP, "head_bias": False},
}

# The content of config.json for models on the Hub, without fields that do not describe the model.
VIT_BASE = {
    "architectures": ["ViTModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
}
DINOV2_SMALL = {
    "architectures": ["Dinov2Model"],
    "drop_path_rate": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 384,
    "image_size": 518,
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "use_swiglu_ffn": False,
}
CLIP_LARGE = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "hidden_act": "quick_gelu", "num_attention_heads": 12},
    # Old files hold the default values of all fields in `vision_config`. Values that differ from the defaults are in
    # `vision_config_dict`.
    "vision_config": {"hidden_size": 768, "patch_size": 32, "dropout": 0.0, "num_hidden_layers": 12},
    "vision_config_dict": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


def config_of(model_type, **overrides):
    return ViTConfig(**{**TINY, "num_classes": 7, **FIELDS[model_type], **overrides})


def random_model(config):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    flat = [(path, v.copy(jnp.asarray(rng.standard_normal(v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def arrays(model):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def read_config(fields, **overrides):
    return ARCHITECTURES[fields["model_type"]].read_config(fields, overrides)


class TestReadConfig:
    def test_vit(self):
        config = read_config(VIT_BASE, num_classes=10)
        variant = ViTConfig.from_variant("B/16", num_classes=10, epsilon=1e-12, activation="gelu")
        assert config == variant

    def test_missing_fields_have_their_defaults(self):
        assert read_config({"model_type": "vit"}, num_classes=10) == read_config(VIT_BASE, num_classes=10)
        assert read_config({"model_type": "vit"}).num_classes == 2
        clip = read_config({"model_type": "clip"})
        assert (clip.patch_size, clip.epsilon, clip.activation, clip.num_classes) == (32, 1e-5, "quick_gelu", 512)

    def test_null_is_missing(self):
        assert read_config({**VIT_BASE, "patch_size": None, "head_dim": None}) == read_config(VIT_BASE)

    def test_dinov2(self):
        config = read_config({**DINOV2_SMALL, "id2label": {"0": "cat", "1": "dog", "2": "newt"}}, image_size=224)
        expected = ViTConfig.from_variant(
            "S/14", num_classes=3, activation="gelu", pool="token+patches", layer_scale=True
        )
        assert config == expected

    def test_clip(self):
        config = read_config(CLIP_LARGE)
        expected = ViTConfig.from_variant(
            "L/14", num_classes=768, activation="quick_gelu", epsilon=1e-5, head_bias=False, **CLIP
        )
        assert config == expected

    def test_clip_classifier(self):
        labels = {str(number): str(number) for number in range(5)}
        config = read_config({**CLIP_LARGE, "architectures": ["CLIPForImageClassification"], "id2label": labels})
        assert (config.num_classes, config.pool, config.final_norm, config.head_bias) == (5, "patches", False, True)

    def test_square_sizes(self):
        assert read_config({**VIT_BASE, "image_size": [384, 384], "patch_size": [16, 16]}).grid == 24

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({**VIT_BASE, "hidden_act": "geli"}, "hidden_act = 'geli', but there are .* did you mean 'gelu'"),
            ({**VIT_BASE, "hidden_act": "mish"}, "hidden_act = 'mish', but there are"),
            (
                {**VIT_BASE, "image_size": [224, 448]},
                r"image_size = \[224, 448\], but our images and patches are square",
            ),
            ({**VIT_BASE, "patch_size": []}, r"patch_size = \[\], but our images and patches are square"),
            ({**VIT_BASE, "head_dim": 32}, "head_dim = 32, but our heads have .* 64 features"),
            ({**VIT_BASE, "hidden_size": "768"}, "hidden_size = '768', but that must be int"),
            ({**VIT_BASE, "layer_norm_eps": "1e-12"}, "layer_norm_eps = '1e-12', but that must be a number"),
            ({**VIT_BASE, "id2label": ["cat"]}, r"id2label = \['cat'\], but that must be Mapping"),
            ({**VIT_BASE, "num_attention_heads": 7}, "7 heads for width 768"),
            ({**VIT_BASE, "id2label": {}}, "num_classes must be a positive integer, got 0"),
            ({**DINOV2_SMALL, "use_swiglu_ffn": True}, "this dinov2 .* use_swiglu_ffn = True, but our MLP has"),
            ({"model_type": "clip", "vision_config": 3}, "vision_config = 3, but that must be Mapping"),
        ],
    )
    def test_what_our_model_cannot_express(self, fields, message):
        with pytest.raises(UserError, match=message):
            read_config(fields)

    def test_unknown_override(self):
        with pytest.raises(UserError, match=r"no field 'pach_size'.*did you mean 'patch_size'"):
            read_config(VIT_BASE, pach_size=8)


class TestWriteConfig:
    @pytest.mark.parametrize("model_type", FIELDS)
    def test_is_read_again(self, model_type):
        config = config_of(model_type, activation="relu", epsilon=1e-3, dropout=0.0)
        written = ARCHITECTURES[model_type].write_config(config)
        assert written["model_type"] == model_type
        assert not {"id2label", "label2id"} & written.keys()
        assert read_config(written) == config
        labels = {str(number): f"class {number}" for number in range(7)}
        assert read_config({**written, "id2label": labels}) == config

    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
    def test_activations(self, activation):
        config = config_of("vit", activation=activation)
        assert read_config(ARCHITECTURES["vit"].write_config(config)) == config

    @pytest.mark.parametrize("model_type", FIELDS)
    def test_the_fields_decide_the_architecture(self, model_type):
        assert architecture_of(config_of(model_type)) is ARCHITECTURES[model_type]

    @pytest.mark.parametrize(
        ("model_type", "overrides", "message"),
        [
            (
                "clip_vision_model",
                {"head_bias": True},
                "CLIPVisionModelWithProjection, has head_bias=False, the .*=True",
            ),
            ("clip", {"final_norm": True}, "nearest, CLIPForImageClassification, has final_norm=False, the model has"),
            ("clip", {"qkv_bias": False}, "nearest, CLIPForImageClassification, has qkv_bias=True"),
            ("dinov2", {"layer_scale": False}, "nearest, ViTForImageClassification, has pool='token'"),
            ("vit", {"patch_bias": False}, "nearest, ViTForImageClassification, has patch_bias=True"),
            ("vit", {"pool": "patches", "pre_norm": True}, "has no such ViT"),
        ],
    )
    def test_what_transformers_cannot_express(self, model_type, overrides, message):
        with pytest.raises(UserError, match=message):
            architecture_of(config_of(model_type, **overrides))

    def test_another_architecture(self):
        with pytest.raises(
            UserError, match="transformers' vit has no such model: DeiTForImageClassification is a deit"
        ):
            ARCHITECTURES["vit"].write_config(config_of("deit"))

    @pytest.mark.parametrize("mlp_width", [8, 30])
    def test_dinov2_has_a_ratio(self, mlp_width):
        with pytest.raises(UserError, match=f"a whole multiple of the model's, not {mlp_width} for 12"):
            ARCHITECTURES["dinov2"].write_config(config_of("dinov2", mlp_width=mlp_width))


class TestNames:
    @pytest.mark.parametrize("model_type", FIELDS)
    def test_round_trip_is_bit_exact(self, model_type):
        model, architecture = random_model(config_of(model_type)), ARCHITECTURES[model_type]
        written = written_tree(architecture, model)
        fillers = architecture.fillers(model.config)
        assert len(written) == len(arrays(model)) + len(fillers)
        for name, array in arrays(read_tree(architecture, model.config, written)).items():
            np.testing.assert_array_equal(array, arrays(model)[name], err_msg=name)

    @pytest.mark.parametrize(
        ("model_type", "path", "name"),
        [
            ("vit", "patch_embed/kernel", "vit.embeddings.patch_embeddings.projection.weight"),
            ("vit", "position_embed", "vit.embeddings.position_embeddings"),
            ("vit", "blocks/1/norm1/scale", "vit.encoder.layer.1.layernorm_before.weight"),
            ("vit", "blocks/1/attention/key/bias", "vit.encoder.layer.1.attention.attention.key.bias"),
            ("vit", "blocks/0/attention/out/kernel", "vit.encoder.layer.0.attention.output.dense.weight"),
            ("vit", "blocks/0/mlp/up/kernel", "vit.encoder.layer.0.intermediate.dense.weight"),
            ("vit", "norm/bias", "vit.layernorm.bias"),
            ("vit", "head/kernel", "classifier.weight"),
            ("deit", "distillation_token", "deit.embeddings.distillation_token"),
            ("dinov2", "blocks/1/scale2", "dinov2.encoder.layer.1.layer_scale2.lambda1"),
            ("dinov2", "blocks/0/mlp/down/bias", "dinov2.encoder.layer.0.mlp.fc2.bias"),
            ("clip", "cls_token", "vision_model.embeddings.class_embedding"),
            ("clip", "pre_norm/scale", "vision_model.pre_layrnorm.weight"),
            ("clip", "blocks/0/attention/out/bias", "vision_model.encoder.layers.0.self_attn.out_proj.bias"),
            ("clip", "head/bias", "classifier.bias"),
            ("clip_vision_model", "head/kernel", "visual_projection.weight"),
            ("clip_vision_model", "norm/scale", "vision_model.post_layernorm.weight"),
        ],
    )
    def test_names_on_the_hub(self, model_type, path, name):
        assert ARCHITECTURES[model_type].tensor_name(config_of(model_type), path)[0] == name

    @pytest.mark.parametrize(
        ("model_type", "key", "path"),
        [
            ("vit", "vit.layers.3.attention.q_proj.weight", "blocks/3/attention/query/kernel"),
            ("vit", "layers.3.mlp.fc1.bias", "blocks/3/mlp/up/bias"),
            ("vit", "encoder.layer.10.output.dense.weight", "blocks/10/mlp/down/kernel"),
            ("dinov2", "dinov2.encoder.layer.0.attention.o_proj.weight", "blocks/0/attention/out/kernel"),
            ("clip", "encoder.layers.2.layer_norm2.weight", "blocks/2/norm2/scale"),
        ],
    )
    def test_names_of_modules_and_of_bare_models(self, model_type, key, path):
        rules = ARCHITECTURES[model_type].key_rules(config_of(model_type))
        match, rule = next((m, rule) for rule in rules if (m := re.fullmatch(rule.source, key)))
        assert match.expand(rule.target) == path

    def test_layouts(self):
        model = random_model(config_of("clip_vision_model"))
        written, a = written_tree(ARCHITECTURES["clip_vision_model"], model), arrays(model)
        layer, x = "vision_model.encoder.layers.1.self_attn", np.random.default_rng(1).standard_normal((5, 12))
        heads = np.einsum("td,dnk->tnk", x, a["blocks/1/attention/query/kernel"]) + a["blocks/1/attention/query/bias"]
        theirs = x @ written[f"{layer}.q_proj.weight"].T + written[f"{layer}.q_proj.bias"]
        np.testing.assert_allclose(theirs, heads.reshape(5, 12), rtol=1e-6)
        out = np.einsum("tnk,nkd->td", heads, a["blocks/1/attention/out/kernel"])
        np.testing.assert_allclose(theirs @ written[f"{layer}.out_proj.weight"].T, out, rtol=1e-6)
        kernel = written["vision_model.embeddings.patch_embedding.weight"]
        assert kernel.shape == (12, 2, 4, 4)
        assert kernel[5, 1, 2, 3] == a["patch_embed/kernel"][2, 3, 1, 5]
        assert written["vision_model.embeddings.position_embedding.weight"].shape == (5, 12)


class TestOtherKeys:
    @pytest.mark.parametrize(
        ("model_type", "keys"),
        [
            ("vit", ["pooler.dense.weight", "vit.pooler.dense.bias"]),
            ("deit", ["cls_classifier.weight", "distillation_classifier.bias"]),
            ("dinov2", ["embeddings.mask_token"]),
            (
                "clip_vision_model",
                [
                    "logit_scale",
                    "text_projection.weight",
                    "text_model.embeddings.position_ids",
                    "text_model.encoder.layers.0.mlp.fc1.weight",
                    "vision_model.embeddings.position_ids",
                ],
            ),
            ("clip", ["visual_projection.weight", "vision_model.post_layernorm.bias"]),
        ],
    )
    def test_ignored(self, model_type, keys):
        model, architecture = random_model(config_of(model_type)), ARCHITECTURES[model_type]
        tree = {**written_tree(architecture, model), **dict.fromkeys(keys, np.zeros(3, np.int64))}
        for name, array in arrays(read_tree(architecture, model.config, tree)).items():
            np.testing.assert_array_equal(array, arrays(model)[name], err_msg=name)

    @pytest.mark.parametrize("model_type", FIELDS)
    def test_nothing_else_is_ignored(self, model_type):
        architecture, prefix = ARCHITECTURES[model_type], ARCHITECTURES[model_type].prefix
        tree = written_tree(architecture, random_model(config_of(model_type)))
        extra = {f"{prefix}encoder.norm.weight": np.zeros(3), "decoder.weight": np.zeros(3)}
        with pytest.raises(UserError, match=r"nothing reads the key 'decoder.weight'|encoder.norm.weight") as error:
            read_tree(architecture, config_of(model_type), tree | extra)
        assert all(repr(key) in str(error.value) for key in extra)

    def test_two_heads_are_not_read_as_one(self):
        architecture, model = ARCHITECTURES["deit"], random_model(config_of("deit"))
        tree = {
            key.replace("classifier", "cls_classifier"): array
            for key, array in written_tree(architecture, model).items()
        }
        with pytest.raises(UserError, match="no key fills 'head/kernel'"):
            read_tree(architecture, model.config, tree)
        body = read_tree(architecture, model.config, tree, fresh=("head/",))
        np.testing.assert_array_equal(body.position_embed[...], model.position_embed[...])

    def test_positions_are_resized(self):
        model, architecture = random_model(config_of("deit")), ARCHITECTURES["deit"]
        larger = read_tree(architecture, config_of("deit", image_size=12), written_tree(architecture, model))
        embed = model.position_embed[...]
        np.testing.assert_array_equal(larger.position_embed[0, :2], embed[0, :2])
        grid = jax.image.resize(embed[0, 2:].reshape(2, 2, 12), (3, 3, 12), "cubic-pytorch", antialias=False)
        np.testing.assert_allclose(larger.position_embed[0, 2:], grid.reshape(9, 12), rtol=1e-5, atol=1e-5)
