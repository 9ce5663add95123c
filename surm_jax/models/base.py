"""Base classes and registry of models, and the checks that all model configurations share.

A new model is one file with a `Config` and a `Model` decorated with `register_model`. To read and write checkpoints of
Hugging Face transformers, it also gives an `Architecture` to `surm_jax.pretrained.hf.register_architecture`. Importing
the file registers all of them, and no other file changes.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from flax import nnx

from surm_jax.errors import UserError, did_you_mean, require_one_of
from surm_jax.models.layers import REMAT, Blocks

DTYPES = ("float32", "bfloat16")
# Bounds on numbers that come from files: JAX cannot handle larger sizes, and every block takes time to build.
_LARGEST_SIZE, _MOST_BLOCKS = 2**31, 100

READS = ("images", "text")
"""Kinds of input. A task chooses a model by the kind of input that the model reads."""

HEAD = (r"head/.*",)
"""Patterns of the parameters of the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of the configurations of models: frozen dataclasses of numbers, booleans and strings.

    A model of images also has the fields `image_size` and `channels`, a model of text `vocab_size`, `pad_token` and
    `max_tokens`.

    Attributes:
        num_classes: Outputs of the head.
    """

    num_classes: int

    VARIANTS: ClassVar[dict[str, Mapping[str, Any]]] = {}
    """The fields that each named model sets."""

    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields that change how the model runs, but not which parameters it has. A checkpoint may have other values."""

    HEAD_FIELDS: ClassVar[tuple[str, ...]] = ("num_classes",)
    """Fields that change only the head and its input. A checkpoint may have other values if its head is not loaded."""

    @property
    def new_head(self) -> tuple[str, ...]:
        """Patterns of the parameters that a new task initialises and trains."""
        return HEAD

    @property
    def position_grids(self) -> Mapping[str, int]:
        """Position embeddings of a square grid of patches, which are resized when `image_size` changes.

        Maps the path of each such parameter to the number of tokens before the patches, such as 1 for a class token.
        """
        return {}

    @classmethod
    def build(cls, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        """Return the configuration with these fields, some of them replaced or added by the overrides.

        Raises:
            UserError: An override is not a field, or the fields do not fit together.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise UserError(f"{cls.__name__} has no field {name!r}; it has {known}{did_you_mean(name, known)}")
        return cls(**{**fields, **overrides})

    @classmethod
    def from_variant(cls, name: str, **fields: Any) -> Self:
        """Return the configuration of a named model (`VARIANTS`), with some fields set or replaced.

        Raises:
            UserError: The name is not a variant, a field is unknown, or the fields do not fit together.
        """
        if name not in cls.VARIANTS:
            raise UserError(
                f"there is no {cls.__name__.removesuffix('Config')} {name!r}; there are {sorted(cls.VARIANTS)}"
                f"{did_you_mean(name, cls.VARIANTS)}"
            )
        return cls.build(cls.VARIANTS[name], fields)


class Model(nnx.Module):
    """Base class of models.

    A model is built as `Model(config, rngs=...)` and keeps its configuration as `config`. It returns float32 logits, of
    shape (batch, num_classes) for classification. A model of images is called as `model(images, rngs=key)`, a model of
    text as `model(tokens, mask=..., token_types=..., rngs=key)`. `rngs` is the random key of dropout, and `None` turns
    dropout off. The head's parameters have paths `head/...`. The model keeps its blocks in `blocks` and runs them with
    `blocks.run`, which lets training compile equal blocks once and split their weights over devices.
    """

    config_class: ClassVar[type[Config]]
    """The class of the configuration. Each model has its own."""

    reads: ClassVar[str]
    """What the model reads, one of `READS`."""

    adapter_targets: ClassVar[Mapping[str, str]] = {}
    """Patterns of module paths by name, for adapters; see `surm_jax.peft.Rule`."""

    config: Any
    blocks: Blocks

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        raise NotImplementedError(f"{type(self).__name__} must define __init__(config, *, rngs)")


AnyModel = TypeVar("AnyModel", bound=Model)

MODELS: dict[str, type[Model]] = {}
"""The registered models by the name of their class."""


def register_model(model: type[AnyModel]) -> type[AnyModel]:
    """Add a model to the registry. Use it as the decorator of the class.

    A class that is defined again under the same name in the same module, as in a notebook, replaces the earlier one.

    Raises:
        UserError: The class lacks a part of the protocol, or another model has its name, its configuration class or the
            name of one of its variants.
    """
    name, config_class = model.__name__, getattr(model, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, Config)):
        raise UserError(f"{name}.config_class must be a subclass of surm_jax.models.Config, got {config_class!r}")
    require_one_of(f"{name}.reads", getattr(model, "reads", None), READS)
    others = [other for other in MODELS.values() if _place(other) != _place(model)]
    if name in {other.__name__ for other in others}:
        raise UserError(f"there is already a model {name!r}, in {MODELS[name].__module__}: choose another name")
    for other in others:
        if other.config_class is config_class:
            raise UserError(f"{name} needs its own config_class: {config_class.__name__} belongs to {other.__name__}")
        if other.reads == model.reads and (same := other.config_class.VARIANTS.keys() & config_class.VARIANTS.keys()):
            raise UserError(f"{name} has the variant {min(same)!r}, but {other.__name__} has it already")
    MODELS[name] = model
    return model


def _place(model: type[Model]) -> tuple[str, str]:
    return model.__module__, model.__qualname__


def model_class(config: Config) -> type[Model]:
    """Return the model that is built from a configuration.

    Raises:
        UserError: No registered model has this configuration class.

    >>> from surm_jax.models import ViTConfig
    >>> model_class(ViTConfig.from_variant("B/16", num_classes=10)).__name__
    'ViT'
    """
    for model in MODELS.values():
        if model.config_class is type(config):
            return model
    raise UserError(f"no model is registered for a {type(config).__name__}; there are {sorted(MODELS)}")


def variant_names(reads: str | None = None) -> list[str]:
    """Return the names of the variants of all models, or of those that read one kind of input.

    >>> variant_names("text")
    ['tiny', 'mini', 'small', 'medium', 'base', 'large']
    """
    models = [model for model in MODELS.values() if reads in (None, model.reads)]
    return list(dict.fromkeys(name for model in models for name in model.config_class.VARIANTS))


def model_of_variant(name: str, reads: str) -> type[Model]:
    """Return the model that has a variant of this name.

    Args:
        name: The variant. Models that read different inputs may have variants of the same name.
        reads: The kind of input, one of `READS`.

    Raises:
        UserError: No model has this variant; the message names the nearest one.

    >>> model_of_variant("mini", "images").__name__, model_of_variant("mini", "text").__name__
    ('ViT', 'Bert')
    """
    for model in MODELS.values():
        if model.reads == reads and name in model.config_class.VARIANTS:
            return model
    known = variant_names(reads)
    raise UserError(f"there is no model of {reads} {name!r}; there are {sorted(known)}{did_you_mean(name, known)}")


def check_sizes(config: Config, names: Iterable[str]) -> None:
    """Raise a `UserError` unless each of the fields is a positive integer and not too large."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")
        if value > _LARGEST_SIZE:
            raise UserError(f"{type(config).__name__}.{name} must be at most {_LARGEST_SIZE}, got {value}")


def check_choice(config: Config, name: str, known: Collection[str]) -> None:
    """Raise a `UserError` with the nearest names unless the field is one of `known`."""
    require_one_of(f"{type(config).__name__}.{name}", getattr(config, name), known)


def check_transformer(config: Any) -> None:
    """Check the fields that all transformers share: booleans, depth, heads, dropout, epsilon, dtypes and remat.

    Raises:
        UserError: A value is invalid; the message names the field.
    """
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
