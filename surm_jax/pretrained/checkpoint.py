"""The interface of open checkpoints, for all formats: return the configuration of the model, and fill the model."""

import abc
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from surm_jax.errors import UserError
from surm_jax.models import Config
from surm_jax.pretrained.normalization import Normalization


class Checkpoint(abc.ABC):
    """An open checkpoint.

    Attributes:
        path: The file or folder, which messages name.
    """

    path: Path

    @abc.abstractmethod
    def config(self, variant: str | None, overrides: Mapping[str, Any]) -> Config:
        """Return the configuration of the model in the checkpoint.

        Args:
            variant: The name of the model, for formats that hold no configuration; `None` for all other formats.
            overrides: Fields of our configuration that replace what the checkpoint says.

        Raises:
            UserError: The checkpoint is damaged or holds an unknown model, an override is not a field, or the variant
                is missing or superfluous.
        """

    @abc.abstractmethod
    def fill(
        self, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
    ) -> dict[str, jax.Array]:
        """Read the parameters of a model.

        Args:
            config: The configuration of the model that is to be filled.
            targets: The parameters to read, by path, with their shapes, dtypes and shardings.
            fresh: The paths of parameters that the checkpoint must not fill.

        Raises:
            UserError: The checkpoint is damaged or was written for another model, see `require_same` and
                `surm_jax.pretrained.rules.fill`.
        """

    def normalization(self) -> Normalization | None:
        """Return how images are normalised for the model; `None` means that all channels are scaled to [-1, 1].

        Raises:
            UserError: The checkpoint is damaged.
        """
        return None

    def _refuse_variant(self, variant: str | None) -> None:
        if variant is not None:
            raise UserError(f"{self.path} already says which model it holds: leave out variant={variant!r}")


def reads_head(targets: Collection[str]) -> bool:
    """Return whether a parameter of the head is among the paths to read."""
    return any(target.startswith("head/") for target in targets)


def require_same(origin: str, stored: Config, config: Config, targets: Collection[str]) -> None:
    """Check that the configuration in a checkpoint is that of the model to fill.

    Some fields may differ: `RUNTIME_FIELDS`; `image_size` if the model has position embeddings, which are resized; and
    `HEAD_FIELDS` if no parameter of the head is read.

    Args:
        origin: The name of the checkpoint in the error.
        stored: The configuration in the checkpoint.
        config: The configuration of the model.
        targets: The paths of the parameters that are read.

    Raises:
        UserError: Fields differ; the message names all of them.
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
