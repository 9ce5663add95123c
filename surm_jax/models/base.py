"""Checks that the configurations of all models share. Each raises a `UserError` that names the field."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from surm_jax.errors import UserError, did_you_mean
from surm_jax.models.layers import REMAT

DTYPES = ("float32", "bfloat16")
_LARGEST_SIZE = 2**31
_MOST_BLOCKS = 100  # A file may say any number, and time goes into every one.

Config = TypeVar("Config")


def check_sizes(config: Any, names: Iterable[str]) -> None:
    """Raises a `UserError` unless each of the fields is a positive integer, and of a size that can be."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")
        if value > _LARGEST_SIZE:
            raise UserError(f"{type(config).__name__}.{name} must be at most {_LARGEST_SIZE}, got {value}")


def check_choice(config: Any, name: str, known: Collection[str]) -> None:
    """Raises a `UserError` with the nearest names unless the field is one of `known`."""
    value = getattr(config, name)
    if value not in known:
        raise UserError(
            f"{type(config).__name__}.{name} must be one of {tuple(known)}, got {value!r}"
            f"{did_you_mean(str(value), known)}"
        )


def check_transformer(config: Any) -> None:
    """Checks what every transformer's configuration has: heads, dropout, epsilon, dtypes, remat, switches."""
    kind = type(config).__name__
    for field in dataclasses.fields(config):
        if field.type is bool and not isinstance(getattr(config, field.name), bool):
            raise UserError(f"{kind}.{field.name} must be True or False, got {getattr(config, field.name)!r}")
    if config.depth > _MOST_BLOCKS:
        raise UserError(f"{kind}.depth must be at most {_MOST_BLOCKS}, got {config.depth}")
    if config.width % config.heads:
        raise UserError(f"{kind}.heads must divide the width, got {config.heads} heads for width {config.width}")
    if not (isinstance(config.dropout, int | float) and 0.0 <= config.dropout < 1.0):
        raise UserError(f"{kind}.dropout must be in [0, 1), got {config.dropout!r}")
    if not (isinstance(config.epsilon, int | float) and 0.0 < config.epsilon < math.inf):
        raise UserError(f"{kind}.epsilon must be positive and finite, got {config.epsilon!r}")
    check_choice(config, "dtype", DTYPES)
    check_choice(config, "param_dtype", DTYPES)
    check_choice(config, "remat", REMAT)


def from_variant(
    cls: type[Config], kind: str, variants: Mapping[str, Mapping[str, Any]], name: str, fields: Mapping[str, Any]
) -> Config:
    """Returns the configuration of a named model, with some fields set or replaced.

    Args:
        cls: the dataclass.
        kind: what the error calls such a model, such as "ViT".
        variants: fields of the named models.
        name: one of them.
        fields: further fields, and replacements.

    Raises:
        UserError: no such variant or field, or the fields do not fit together.
    """
    if name not in variants:
        raise UserError(f"there is no {kind} {name!r}; there are {sorted(variants)}{did_you_mean(name, variants)}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise UserError(f"{cls.__name__} has no field {key!r}; it has {known}{did_you_mean(key, known)}")
    return cls(**{**variants[name], **fields})
