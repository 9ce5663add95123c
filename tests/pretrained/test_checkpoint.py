import dataclasses

import pytest

from surm_jax.errors import UserError
from surm_jax.models import BertConfig, ViTConfig
from surm_jax.pretrained.checkpoint import require_same

CONFIGS = [ViTConfig.from_variant("digits", num_classes=3), BertConfig.from_variant("tiny", num_classes=3)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_other_field_is_compared(config):
    """Check that `require_same` compares every field, except those that may differ between file and model.

    The value in the file is a meaningless string, since a file may hold any value.
    """
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
