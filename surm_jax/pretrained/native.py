"""Our own model file: safetensors with the parameters' paths as names, and the model's configuration in the header."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from surm_jax.atomic import replacing
from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.pretrained.rules import KeyRule, fill

FORMAT = "surm_jax.model.1"
SUFFIX = ".safetensors"

RULES = (KeyRule(r"(.+)", r"\1"),)


def save_model(path: Path | str, model: nnx.Module, config: Any) -> None:
    """Writes all parameters of a model, each in its dtype, and its configuration to one file, atomically.

    Args:
        path: ends in `.safetensors`; replaced if it exists.
        model: its `nnx.Param`s are written, named by their `/`-joined paths.
        config: the frozen dataclass that the model was built from.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"a model file ends in {SUFFIX!r}, got {path}")
    tensors = {
        join(keys): np.asarray(variable[...], order="C")
        for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    header = {"format": FORMAT, "model": type(config).__name__, "config": json.dumps(dataclasses.asdict(config))}
    try:
        with replacing(path) as temporary:
            # Not save_file, whose files only their owner can read.
            temporary.write_bytes(save(tensors, metadata=header))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def read(
    path: Path, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
) -> dict[str, jax.Array]:
    """Reads the parameters of a model from a file of `save_model`.

    The configuration in the file is compared first, but for `config.RUNTIME_FIELDS`, and for `config.HEAD_FIELDS` where
    no parameter of the head is read.

    Args:
        path: the file.
        config: of the model that is to be filled.
        targets: the parameters to read, by path.
        fresh: the parameters that the file must not fill.

    Raises:
        UserError: the file is damaged, is not of this format, or was written for another model.
    """
    skipped = {*config.RUNTIME_FIELDS}
    if not any(target.startswith("head/") for target in targets):
        skipped |= {*config.HEAD_FIELDS}
    try:
        with safe_open(path, framework="numpy") as file:
            _compare(path, file.metadata() or {}, config, skipped)
            return fill(file.keys(), file.get_tensor, targets, RULES, fresh=fresh, origin=str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it may be incomplete, fetch it again"
        ) from error


def _compare(path: Path, header: Mapping[str, str], config: Any, skipped: Collection[str]) -> None:
    """Raises a `UserError` that names the fields in which the file's configuration differs from the model's."""
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by save_model: its header has format {header.get('format')!r}, not {FORMAT!r}"
        )
    if header.get("model") != type(config).__name__:
        raise UserError(f"{path} holds a model of {header.get('model')}, not of {type(config).__name__}")
    try:
        theirs = json.loads(header["config"])
    except (KeyError, ValueError) as error:
        raise UserError(f"the header of {path} is damaged: no configuration ({error})") from error
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        raise UserError(f"the header of {path} is damaged: its configuration must have the fields {sorted(ours)}")
    different = [
        f"{name} is {theirs[name]!r} in the file and {ours[name]!r} in the model"
        for name in ours
        if name not in skipped and theirs[name] != ours[name]
    ]
    if different:
        raise UserError(f"{path} was written for another model: {'; '.join(different)}")
