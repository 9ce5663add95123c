import dataclasses

import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig, ViT, ViTConfig
from surm_jax.pretrained.configs import MODELS, config_class, require_fields, require_same

CONFIGS = {
    ViT: ViTConfig.from_variant("digits", num_classes=3),
    Bert: BertConfig.from_variant("tiny", num_classes=3),
}


@pytest.mark.parametrize("model", CONFIGS)
def test_models_by_the_class_of_their_configuration(model):
    config = CONFIGS[model]
    assert MODELS[type(config)] is model
    assert config_class(model) is type(config)
    assert nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))).config == config
    # What is compared, and when, is said in fields that there are.
    require_fields(type(config), [*config.RUNTIME_FIELDS, *config.HEAD_FIELDS])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: type(config).__name__)
def test_every_other_field_is_compared(config):
    """The changed values need not make sense: those of a file may be anything."""
    for field in dataclasses.fields(config):
        stored = dataclasses.replace(config)
        object.__setattr__(stored, field.name, "other")
        message = f"the file was written for another model: {field.name} is 'other' in the file and "
        if field.name in (*config.RUNTIME_FIELDS, "image_size"):
            require_same("the file", stored, config, ["head/kernel"])
            continue
        with pytest.raises(UserError, match=message):
            require_same("the file", stored, config, ["head/kernel", "norm/scale"])
        if field.name in config.HEAD_FIELDS:
            require_same("the file", stored, config, ["norm/scale"])
        else:
            with pytest.raises(UserError, match=message):
                require_same("the file", stored, config, ["norm/scale"])


def test_unknown_field():
    with pytest.raises(UserError, match=r"BertConfig has no field 'witdh'.*did you mean 'width'"):
        require_fields(BertConfig, ["depth", "witdh"])
