"""Tests of the registry of models, and of the protocol that `Model` defines for every registered model."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import (
    MODELS,
    Bert,
    BertConfig,
    Config,
    Decoder,
    DecoderConfig,
    Model,
    ViT,
    ViTConfig,
    model_class,
    model_of_variant,
    register_model,
    variant_names,
)
from surm_jax.models.base import READS

CONFIGS = {
    ViT: ViTConfig.from_variant("digits", num_classes=3),
    Bert: BertConfig.from_variant("tiny", num_classes=3),
    Decoder: DecoderConfig.from_variant("decoder-mini", tied_head=False),
}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Give each test its own copy of the registry of models, so that nothing stays registered."""
    monkeypatch.setattr("surm_jax.models.base.MODELS", {**MODELS})


class TestEveryModel:
    def test_has_a_case(self):
        ours = {model for model in MODELS.values() if model.__module__.startswith("surm_jax.")}
        assert ours == CONFIGS.keys()

    @pytest.mark.parametrize("model", CONFIGS)
    def test_keeps_the_protocol(self, model):
        config = CONFIGS[model]
        assert model_class(config) is model
        assert type(config) is model.config_class
        assert {*config.RUNTIME_FIELDS, *config.HEAD_FIELDS} <= {field.name for field in dataclasses.fields(config)}
        abstract = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
        assert abstract.config == config
        assert len(abstract.blocks) == config.depth
        paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(abstract))}
        assert any(path.startswith("head/") for path in paths)
        assert config.position_grids.keys() <= paths

    @pytest.mark.parametrize("model", CONFIGS)
    def test_is_called_as_a_task_calls_it(self, model):
        config = CONFIGS[model]
        if model.reads == "images":
            arguments = {"images_bhwc": jnp.zeros((2, config.image_size, config.image_size, config.channels))}
        else:
            tokens = jnp.zeros((2, 5), jnp.int32)
            others = {"text": {"mask": tokens, "token_types": tokens}, "prompts": {"segments": tokens}}
            arguments = {"tokens_bt": tokens, **others[model.reads]}
        key = jax.random.key(0)
        logits = jax.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))(**arguments, rngs=key))
        expected = (2, 5, config.vocab_size) if model.reads == "prompts" else (2, 3)
        assert (logits.shape, logits.dtype) == (expected, jnp.float32)

    def test_is_found_by_its_variants(self):
        for model in CONFIGS:
            for name in model.config_class.VARIANTS:
                assert model_of_variant(name, model.reads) is model
        assert {"B/16", "digits", "mini"} <= {*variant_names("images")}
        assert {*variant_names()} == {name for reads in READS for name in variant_names(reads)}

    def test_an_unknown_variant_names_the_nearest(self):
        with pytest.raises(UserError, match=r"no model of images 'B/61'; there are .*did you mean 'B/16'"):
            model_of_variant("B/61", "images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(Config):
    num_classes: int
    width: int = 3

    VARIANTS: ClassVar = {"own": {"width": 4}}


def make(name="Own", **attributes):
    return type(name, (Model,), {"config_class": OwnConfig, "reads": "images", **attributes})


class TestRegister:
    def test_a_new_model_is_found(self):
        model = register_model(make())
        assert model_class(OwnConfig(num_classes=2)) is model
        assert model_of_variant("own", "images") is model
        assert OwnConfig.from_variant("own", num_classes=2) == OwnConfig(width=4, num_classes=2)

    def test_the_same_definition_again_replaces_it(self):
        register_model(make())
        again = register_model(make())
        assert model_class(OwnConfig(num_classes=2)) is again

    @pytest.mark.parametrize(
        ("attributes", "message"),
        [
            ({"reads": "image"}, "Own.reads must be one of .*did you mean 'images'"),
            (
                {"config_class": dict},
                "Own.config_class must be a subclass of .*Config, got <class 'dict'>",
            ),
            ({"config_class": ViTConfig}, "Own needs its own config_class: ViTConfig belongs to ViT"),
            ({"name": "ViT"}, r"already a model 'ViT', in surm_jax\.models\.vit"),
        ],
    )
    def test_mistakes(self, attributes, message):
        with pytest.raises(UserError, match=message):
            register_model(make(**attributes))

    def test_a_variant_of_another_model(self, monkeypatch):
        monkeypatch.setattr(OwnConfig, "VARIANTS", {"digits": {}})
        with pytest.raises(UserError, match="Own has the variant 'digits', but ViT has it already"):
            register_model(make())

    def test_a_configuration_without_a_model(self):
        with pytest.raises(UserError, match="no model is registered for a OwnConfig; there are"):
            model_class(OwnConfig(num_classes=2))


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(UserError, match=r"BertConfig has no field 'witdh'.*did you mean 'width'"):
        BertConfig.build({}, {"depth": 1, "witdh": 2})


@pytest.mark.parametrize("model", [model for model in CONFIGS if model.after_blocks is not None])
def test_a_model_goes_on_from_every_cut(model):
    config = CONFIGS[model]
    whole = model(config, rngs=nnx.Rngs(0))
    kernel = whole.head.kernel
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    if model.reads == "images":
        inputs, options = jax.random.normal(jax.random.key(2), (2, 8, 8, 1)), {}
    else:
        inputs = jax.random.randint(jax.random.key(2), (2, 6), 1, 99)
        options = {"mask": jnp.arange(6)[None] < jnp.array([[6], [4]]), "token_types": inputs % 2}
    expected = whole(inputs, **options)
    for cut in range(config.depth + 2):
        state = whole.before(cut, inputs, **options)
        assert state.ndim == (2 if cut > config.depth else 3)
        after = {name: value for name, value in options.items() if name != "token_types"}
        np.testing.assert_allclose(whole.after(cut, state, **after), expected, atol=1e-5)
