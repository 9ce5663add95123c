"""Read and write model files in our own format.

It is safetensors, with the path of each parameter as the name of its tensor and the model's configuration in the
header.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from surm_jax.atomic import replacing
from surm_jax.errors import UserError, did_you_mean
from surm_jax.models import MODELS, Config, Model
from surm_jax.paths import join
from surm_jax.preparation import Preparation
from surm_jax.pretrained.checkpoint import Checkpoint, bounded, require_same
from surm_jax.pretrained.image_processor import read_processor, write_processor
from surm_jax.pretrained.position_embed import resize_position_embed
from surm_jax.pretrained.rules import KeyRule, fill
from surm_jax.tensor_files import SUFFIX, TensorFile, write_tensors

FORMAT = "surm_jax.model.1"


def save_model(
    path: Path | str,
    model: Model,
    *,
    preparation: Preparation | None = None,
) -> None:
    """Write all parameters of a model and its configuration to one file.

    Each parameter keeps its dtype. The file is written atomically: if writing fails, an existing file is unchanged.

    Args:
        path: The path of the file, which must end in `.safetensors`. An existing file is replaced.
        model: The model. Its `nnx.Param`s are written, and their names are their paths, joined by `/`.
        preparation: How images were prepared for the model. `None` means that they were resized to a square and scaled
            to [-1, 1]. The function `image_preparation` reads this value from the file.

    Raises:
        UserError: The path has another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"a model file ends in {SUFFIX!r}, got {path}")
    tensors = {
        join(keys): np.asarray(variable[...]) for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    header = {
        "format": FORMAT,
        "model": type(model.config).__name__,
        "config": json.dumps(dataclasses.asdict(model.config)),
    }
    if preparation is not None:
        header["image_processor"] = json.dumps(write_processor(preparation, model.config.channels))
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, tensors, header)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


class NativeCheckpoint(Checkpoint):
    """An open model file that `save_model` wrote."""

    def __init__(self, path: Path, file: TensorFile) -> None:
        self.path, self._file = path, file

    @staticmethod
    def holds(file: TensorFile) -> bool:
        """Return whether a safetensors file was written by `save_model`."""
        return file.header.get("format") == FORMAT

    def config(self, variant: str | None, overrides: Mapping[str, Any]) -> Config:
        """Return the configuration in the header, with fields replaced by the overrides.

        Raises:
            UserError: The header is damaged, an override is not a field of the configuration, or a variant is given.
        """
        self._refuse_variant(variant)
        stored = self._stored()
        return stored.build(dataclasses.asdict(stored), overrides)

    def fill(
        self, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
    ) -> dict[str, jax.Array]:
        """Read the parameters of a model. Its configuration must agree with that in the header (see `require_same`).

        Position embeddings are resized to the model's image size by bilinear interpolation, as for AugReg checkpoints.
        """
        require_same(str(self.path), self._stored(), config, targets)
        rules = [
            KeyRule(re.escape(path), path, partial(resize_position_embed, extra_tokens=tokens))
            for path, tokens in config.position_grids.items()
        ]
        rules.append(KeyRule(r"(.+)", r"\1"))
        return fill(self._file.keys, self._file.read, targets, rules, fresh=fresh, origin=str(self.path))

    def preparation(self) -> Preparation:
        """Return how images are prepared for the model, as the header says."""
        if "normalization" in self._file.header:
            raise UserError(f"{self.path} has a header of an older version: write the file again")
        entry = self._file.header.get("image_processor")
        if entry is None:
            return Preparation()
        try:
            fields = json.loads(entry)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: its header has no image_processor ({error})") from None
        if not isinstance(fields, dict):
            raise UserError(f"{self.path} is damaged: the image_processor in its header is {entry}")
        return read_processor(f"the header of {self.path}", fields, "ViTImageProcessor")

    def _stored(self) -> Config:
        header = self._file.header
        name = header.get("model", "")
        classes = {model.config_class.__name__: model.config_class for model in MODELS.values()}
        if name not in classes:
            near = did_you_mean(name, classes)
            raise UserError(f"{self.path} holds a model of {name!r}; known are {sorted(classes)}{near}")
        try:
            # A field that was added to the class after the file was written gets its default, which is chosen so that
            # older models compute the same as before.
            return bounded(classes[name](**json.loads(header["config"])))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"the header of {self.path} is damaged: it holds no {name} ({error})") from error
