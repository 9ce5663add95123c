"""Base classes of models and their configurations, the registry of models, and checks of configurations.

To add a model, write one file with a subclass of `Config` and a subclass of `Model` that is decorated with
`register_model`. If the model should read and write checkpoints of Hugging Face transformers, the file also passes an
`Architecture` to `surm_jax.pretrained.hf.register_architecture`. Importing the file registers the model, and no other
file has to change.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from flax import nnx
from jaxtyping import Array

from surm_jax.errors import UserError, did_you_mean, require_one_of
from surm_jax.models.layers import REMAT, Blocks

DTYPES = ("float32", "bfloat16")
"""The dtypes in which a model can hold its parameters and compute."""

READS = ("images", "text", "prompts")
"""The kinds of input that a model may take. Each task, such as image classification, needs one kind of input.

A model of texts classifies or fills them, and a model of prompts continues them.
"""

HEAD = (r"head/.*",)
"""Regular expressions that match the paths of the head's parameters. The head is the output layer of a model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of model configurations. A configuration is a frozen dataclass of numbers, booleans and strings.

    That of an image model must also have the attributes `image_size` and `channels`, and that of a text model
    `vocab_size`, `pad_token` and `max_tokens`.

    Attributes:
        num_classes: Number of outputs of the head.
    """

    VARIANTS: ClassVar[dict[str, Mapping[str, Any]]] = {}
    """The named sizes of the model, such as "B/16" for a ViT.

    The dictionary maps each name to the values of the configuration's fields in this size. It need not set all fields.
    """

    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that change how the model is computed, but not which parameters it has.

    A model may have other values of these fields than the checkpoint that it loads.
    """

    HEAD_FIELDS: ClassVar[tuple[str, ...]] = ("num_classes",)
    """Names of the fields that change only the head or the computation of the head's input.

    A model that does not load the head of a checkpoint may have other values of these fields than the checkpoint.
    """

    @property
    def new_head(self) -> tuple[str, ...]:
        """Regular expressions for the paths of the parameters that a new task initialises anew and trains."""
        return HEAD

    @property
    def position_grids(self) -> Mapping[str, int]:
        """The parameters that are position embeddings of a square grid of image patches.

        They are resized when a checkpoint is loaded into a model with another `image_size`. The mapping has the path of
        each such parameter as a key. The value is the number of tokens before the patches, such as a class token, which
        are not resized.
        """
        return {}

    @classmethod
    def build(cls, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        """Return a configuration with the given fields.

        Args:
            fields: Values of fields by name.
            overrides: More values of fields by name. They replace those in `fields`.

        Raises:
            UserError: A name in `overrides` is not a field of this class, a value is invalid, or the values do not fit
                together.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise UserError(f"{cls.__name__} has no field {name!r}; it has {known}{did_you_mean(name, known)}")
        return cls(**{**fields, **overrides})

    @classmethod
    def from_variant(cls, name: str, **fields: Any) -> Self:
        """Return the configuration of a named size of the model.

        Args:
            name: One of the names in `VARIANTS`.
            **fields: Values of other fields. They replace those of the variant.

        Raises:
            UserError: There is no variant of this name, a field is unknown, a value is invalid, or the values do not
                fit together.
        """
        if name not in cls.VARIANTS:
            raise UserError(
                f"there is no {cls.__name__.removesuffix('Config')} {name!r}; there are {sorted(cls.VARIANTS)}"
                f"{did_you_mean(name, cls.VARIANTS)}"
            )
        return cls.build(cls.VARIANTS[name], fields)


class Model(nnx.Module):
    """Base class of models. A subclass must keep the following protocol.

    - `Model(config, rngs=...)` builds the model, which keeps its configuration as `config`.
    - An image model is called as `model(images, rngs=key)`, and a text model as `model(tokens, mask=...,
      token_types=..., rngs=key)`. A model of prompts is called as `model(tokens, segments=..., rngs=key)`. `rngs` is
      the random key of dropout, and None turns dropout off.
    - The result is the logits in float32. For classification their shape is (batch, num_classes). A model of prompts
      returns the logits of the vocabulary at every token. It also has methods `features`, with the arguments of a call,
      and `logits`, so that `model.logits(model.features(tokens))` equals `model(tokens)`.
    - The paths of the head's parameters begin with `head/`.
    - The model keeps its transformer blocks in the attribute `blocks`, a `Blocks`, and calls them only by `blocks.run`.
      So training can replace `blocks` by a list with another method `run`. This method compiles equal blocks only once,
      and gathers the sharded weights of one block at a time.
    - A model that can be cut in two sets `after_blocks`, and has the methods `before` and `after`. Training then
      computes what lies before the first trained parameter only once for each example.
    """

    config_class: ClassVar[type[Config]]
    """The class of the model's configuration. Two models must not share one."""

    reads: ClassVar[str]
    """The kind of input that the model takes, one of `READS`."""

    adapter_targets: ClassVar[Mapping[str, str]] = {}
    """Names for common choices of modules to adapt, such as "qkv".

    The dictionary maps each name to a regular expression that matches the paths of these modules. A `surm_jax.Rule`
    accepts such a name in place of a regular expression.
    """

    after_blocks: ClassVar[tuple[str, ...] | None] = None
    """Names of the modules between the last block and the head, such as ("norm",).

    None means that the model cannot be cut in two, so that `before` and `after` are not defined.
    """

    config: Any
    blocks: Blocks

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        raise NotImplementedError(f"{type(self).__name__} must define __init__(config, *, rngs)")

    def before(self, cut: int, inputs: Array, **options: Any) -> Array:
        """Run the model up to a cut, and return its state there, from which `after` goes on.

        Cut k, for k = 0 to depth, lies before block k. Its state has the shape (batch, tokens, width), and the state of
        a token does not depend on how much padding follows. Cut depth + 1 lies before the head, and its state has the
        batch as its first axis.

        Args:
            cut: The number of the cut.
            inputs: The first argument of the model.
            **options: The other arguments of the model, except for `rngs`, which has no effect: there is no dropout.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be cut")

    def after(self, cut: int, state: Array, **options: Any) -> Array:
        """Return the logits, given the state at a cut as `before` returns it. The options are those of the model."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cut")


AnyModel = TypeVar("AnyModel", bound=Model)

MODELS: dict[str, type[Model]] = {}
"""All registered model classes, by the name of the class."""


def register_model(model: type[AnyModel]) -> type[AnyModel]:
    """Add a model class to the registry, and return it. Use this function as the decorator of the class.

    If a class with the same name and module is already registered, the new class replaces it. This happens if a cell of
    a notebook runs again.

    Raises:
        UserError: The class attribute `config_class` or `reads` is missing or invalid, another model has the same name
            or the same configuration class, or another model with the same kind of input has a variant of the same
            name.
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
    """Return the model class to which a configuration belongs.

    Raises:
        UserError: No registered model has the class of this configuration as its `config_class`.

    >>> from surm_jax.models import ViTConfig
    >>> model_class(ViTConfig.from_variant("B/16", num_classes=10)).__name__
    'ViT'
    """
    for model in MODELS.values():
        if model.config_class is type(config):
            return model
    raise UserError(f"no model is registered for a {type(config).__name__}; there are {sorted(MODELS)}")


def variant_names(reads: str | None = None) -> list[str]:
    """Return the names of the variants (named sizes) of all registered models, without duplicates.

    Args:
        reads: A kind of input, one of `READS`. Models that take another kind of input are ignored. With None, no models
            are ignored.

    >>> variant_names("text")
    ['tiny', 'mini', 'small', 'medium', 'base', 'large']
    """
    models = [model for model in MODELS.values() if reads in (None, model.reads)]
    return list(dict.fromkeys(name for model in models for name in model.config_class.VARIANTS))


def model_of_variant(name: str, reads: str) -> type[Model]:
    """Return the model class that has a variant (named size) of the given name.

    Args:
        name: Name of the variant. An image model and a text model may have variants of the same name.
        reads: The kind of input that the model takes, one of `READS`.

    Raises:
        UserError: No model with this kind of input has a variant of this name. The message suggests a similar name.

    In the example, an image model and a text model both have a variant of the name "mini".

    >>> model_of_variant("mini", "images").__name__, model_of_variant("mini", "text").__name__
    ('ViT', 'Bert')
    """
    for model in MODELS.values():
        if model.reads == reads and name in model.config_class.VARIANTS:
            return model
    known = variant_names(reads)
    raise UserError(f"there is no model of {reads} {name!r}; there are {sorted(known)}{did_you_mean(name, known)}")


def check_sizes(config: Config, names: Iterable[str]) -> None:
    """Check that fields of a configuration are positive integers.

    Args:
        config: The configuration.
        names: Names of the fields to check.

    Raises:
        UserError: The value of a field is not a positive integer. The message names the field and its value.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")


def check_choice(config: Config, name: str, known: Collection[str]) -> None:
    """Check that a field of a configuration has one of the `known` values.

    Raises:
        UserError: The field has another value. The message suggests similar ones.
    """
    require_one_of(f"{type(config).__name__}.{name}", getattr(config, name), known)


def check_heads(config: Any) -> None:
    """Check that the attention heads of a configuration divide its width. Call `check_sizes` for both first.

    Raises:
        UserError: `heads` does not divide `width`.
    """
    if config.width % config.heads:
        kind = type(config).__name__
        raise UserError(f"{kind}.heads must divide the width, got {config.heads} heads for width {config.width}")


def check_transformer(config: Any) -> None:
    """Check the fields that the configurations of all transformers have in common, and all boolean fields.

    The common fields are `depth`, `dropout`, `epsilon`, `dtype`, `param_dtype` and `remat`. Call `check_sizes` for
    `depth` first, because this function does not check that it is a positive integer.

    Raises:
        UserError: A value is invalid. The message names the field.
    """
    kind = type(config).__name__
    for field in dataclasses.fields(config):
        if field.type is bool and not isinstance(getattr(config, field.name), bool):
            raise UserError(f"{kind}.{field.name} must be True or False, got {getattr(config, field.name)!r}")
    if not (isinstance(config.dropout, int | float) and 0.0 <= config.dropout < 1.0):
        raise UserError(f"{kind}.dropout must be in [0, 1), got {config.dropout!r}")
    if not (isinstance(config.epsilon, int | float) and 0.0 < config.epsilon < math.inf):
        raise UserError(f"{kind}.epsilon must be positive and finite, got {config.epsilon!r}")
    check_choice(config, "dtype", DTYPES)
    check_choice(config, "param_dtype", DTYPES)
    check_choice(config, "remat", REMAT)
