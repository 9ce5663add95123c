"""Which model a configuration asks for: a named variant, or what the checkpoint itself says."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from surm_jax.errors import UserError
from surm_jax.pretrained import locate, model_config
from surm_jax.training.config import GEOMETRY, ModelConfig


def find_model_config(config: ModelConfig, model: type[nnx.Module], cls: type, outputs: int, reads: str) -> Any:
    """Returns the configuration of a model, an instance of `cls`.

    Args:
        config: variant or checkpoint, and fields to set instead of theirs.
        model: the kind of model that the task needs.
        cls: of its configuration, with `from_variant`.
        outputs: of its head.
        reads: what the task's examples are, for messages.

    Raises:
        UserError: if its fields do not fit together, or the checkpoint that is to say them cannot be read or holds
            another kind of model.
    """
    if config.num_classes not in (0, outputs):
        raise UserError(f"config.model.num_classes={config.num_classes}, but the data asks for {outputs}")
    if config.variant and (config.checkpoint.startswith("hf://") or Path(config.checkpoint).expanduser().is_dir()):
        raise UserError(
            f"config.model.checkpoint={config.checkpoint} says itself which model it holds, down to its numerics:"
            f" set config.model.variant to nothing (--config.model.variant=), not {config.variant!r}"
        )
    fields = {name: value for name in GEOMETRY if (value := getattr(config, name))}
    known = {field.name for field in dataclasses.fields(cls)}
    for name in fields.keys() - known:
        raise UserError(f"config.model.{name}={fields[name]}, but a {model.__name__}, which reads {reads}, has none")
    fields |= {name: getattr(config, name) for name in cls.RUNTIME_FIELDS}
    if config.variant:
        return cls.from_variant(config.variant, num_classes=outputs, **fields)
    checkpoint = locate(config.checkpoint)
    if checkpoint is None:
        raise UserError("config.model.variant is empty, but config.model.checkpoint=none says nothing of a model")
    kind, geometry = model_config(checkpoint, num_classes=outputs, **fields)
    if kind is not model:
        raise UserError(
            f"{checkpoint} holds a {kind.__name__}, but config.data.name asks for a model of {reads} ({model.__name__})"
        )
    return geometry
