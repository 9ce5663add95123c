"""What a checkpoint says of its model, against what the model says of itself."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.models import Bert, BertConfig, ViT, ViTConfig

MODELS: Mapping[type, type[nnx.Module]] = {ViTConfig: ViT, BertConfig: Bert}
"""Our models by the class of their configuration; each is built as `model(config, rngs=...)`."""


def config_class(model: type[nnx.Module]) -> type:
    """Returns the class of a model's configuration.

    >>> config_class(ViT).__name__
    'ViTConfig'
    """
    return next(config for config, built in MODELS.items() if built is model)


def require_fields(config: type, names: Iterable[str]) -> None:
    """Raises a `UserError` that names the nearest field if a name is none of a configuration's fields."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in names:
        if name not in known:
            raise UserError(f"{config.__name__} has no field {name!r}; it has {known}{did_you_mean(name, known)}")


def require_same(origin: str, stored: Any, config: Any, targets: Collection[str]) -> None:
    """Compares the configuration in a checkpoint with that of the model which is to be filled from it.

    `RUNTIME_FIELDS` may differ, so may `image_size`, since position embeddings are resized, and `HEAD_FIELDS` where no
    parameter of the head is read.

    Args:
        origin: what the error calls the checkpoint.
        stored: the configuration in it.
        config: the model's.
        targets: paths of the parameters that are read.

    Raises:
        UserError: naming all fields that differ.
    """
    if type(stored) is not type(config):
        raise UserError(f"{origin} holds a model of {type(stored).__name__}, not of {type(config).__name__}")
    skipped = {*config.RUNTIME_FIELDS, "image_size"}
    if not any(target.startswith("head/") for target in targets):
        skipped |= {*config.HEAD_FIELDS}
    different = [
        f"{field.name} is {getattr(stored, field.name)!r} in the file and {getattr(config, field.name)!r} in the model"
        for field in dataclasses.fields(config)
        if field.name not in skipped and getattr(stored, field.name) != getattr(config, field.name)
    ]
    if different:
        raise UserError(f"{origin} was written for another model: {'; '.join(different)}")
