"""The interface that checkpoints of all formats implement, and a check that a checkpoint belongs to a model."""

import abc
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from surm_jax.errors import UserError
from surm_jax.models import Config
from surm_jax.preparation import Preparation

_LARGEST_SIZE, _MOST_BLOCKS = 2**31, 128
"""Bounds for the configuration in a file. JAX has no larger dimensions, and building a block takes time."""


class Checkpoint(abc.ABC):
    """A checkpoint that is open for reading. Each format has its own subclass.

    Attributes:
        path: The path of the file or folder, for error messages.
    """

    path: Path

    @abc.abstractmethod
    def config(self, variant: str | None, overrides: Mapping[str, Any]) -> Config:
        """Return the configuration of the model in the checkpoint.

        Args:
            variant: The name of a ViT variant, for formats that hold no configuration. For all other formats it must
                be `None`.
            overrides: Fields of our configuration, by name, whose values replace those in the checkpoint.

        Returns:
            The configuration with the overrides applied.

        Raises:
            UserError: The checkpoint is damaged or holds an unknown model, an override is not a field of the
                configuration, a variant is missing, or a variant is given although the format holds a configuration.
        """

    @abc.abstractmethod
    def fill(
        self, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
    ) -> dict[str, jax.Array]:
        """Read the parameters of a model from the checkpoint.

        Args:
            config: The configuration of the model.
            targets: The shape, dtype and sharding of each parameter to read, by path.
            fresh: The paths of the model's other parameters, which are initialised instead of read.

        Returns:
            The array of each parameter in `targets`, by path.

        Raises:
            UserError: The checkpoint is damaged or was written for another model. See `require_same` and
                `surm_jax.pretrained.rules.fill`.
        """

    def preparation(self) -> Preparation:
        """Return how images are prepared for the model. By default, their pixels are scaled to [-1, 1].

        Raises:
            UserError: The checkpoint is damaged, or its settings cannot be followed.
        """
        return Preparation()

    def _refuse_variant(self, variant: str | None) -> None:
        if variant is not None:
            raise UserError(f"{self.path} already says which model it holds: leave out variant={variant!r}")


def bounded(config: Config) -> Config:
    """Check that the numbers in a configuration from a file are small enough to build the model, and return it.

    Raises:
        UserError: A number is too large. The message names its field.
    """
    for field in dataclasses.fields(config):
        value, most = getattr(config, field.name), _MOST_BLOCKS if field.name == "depth" else _LARGEST_SIZE
        if isinstance(value, int) and value > most:
            raise UserError(f"{type(config).__name__}.{field.name} must be at most {most}, got {value}")
    return config


def reads_head(targets: Collection[str]) -> bool:
    """Return whether any of the parameters in `targets` belongs to the model's head."""
    return any(target.startswith("head/") for target in targets)


def require_same(origin: str, stored: Config, config: Config, targets: Collection[str]) -> None:
    """Check that a checkpoint was written for the model whose parameters are read from it.

    The two configurations must have the same class and equal fields, except that these fields may differ:

    - the fields in `config.RUNTIME_FIELDS`;
    - the fields in `config.HEAD_FIELDS`, if no parameter of the head is read;
    - `image_size`, if the model has position embeddings of a grid of patches, because these are resized.

    Args:
        origin: The name of the checkpoint in the error message.
        stored: The configuration in the checkpoint.
        config: The configuration of the model.
        targets: The paths of the parameters that are read.

    Raises:
        UserError: The classes differ, or a field that must be equal differs. The message names all such fields.
    """
    if type(stored) is not type(config):
        raise UserError(f"{origin} holds a model of {type(stored).__name__}, not of {type(config).__name__}")
    skipped = {*config.RUNTIME_FIELDS}
    if config.position_grids:
        skipped.add("image_size")
    if not reads_head(targets):
        skipped.update(config.HEAD_FIELDS)
    different = [
        f"{field.name} is {getattr(stored, field.name)!r} in the file and {getattr(config, field.name)!r} in the model"
        for field in dataclasses.fields(config)
        if field.name not in skipped and getattr(stored, field.name) != getattr(config, field.name)
    ]
    if different:
        raise UserError(f"{origin} was written for another model: {'; '.join(different)}")
