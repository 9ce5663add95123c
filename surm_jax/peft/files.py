"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`, some hundred kilobytes.

The tensors are the updates, each in its smallest form (of a Hadamard pair the product: n numbers), under
`<layer>/delta/<array>`, branches under `<module>/branch/...`, and the parameters that were trained besides, such as the
head, under their paths. The JSON holds the recipe, the fingerprint of the frozen base, and the SHA-256 of these and of
the tensor file.
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json, replacing_folder, require_file
from surm_jax.paths import join, require_match
from surm_jax.peft.adapt import base_parameters, make_part, matched_modules
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter
from surm_jax.peft.fingerprint import check_fingerprint, fingerprint
from surm_jax.peft.lifecycle import parts_of
from surm_jax.peft.parts.attach import attach
from surm_jax.peft.parts.branch import Branch
from surm_jax.peft.parts.update import Delta
from surm_jax.peft.parts.variables import AdapterParam
from surm_jax.tensor_files import TensorFile

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
FORMAT = 3

_MOST_BYTES_OF_CONFIG = 2**22
"""The fingerprint has some seventy bytes for each parameter of the base."""


def save_adapter(folder: str | os.PathLike, model: nnx.Module, adapter: Adapter) -> int:
    """Writes the adapter of an adapted model to a folder, replacing an adapter that is there.

    The folder is complete or absent at every moment.

    Args:
        folder: where to; its parents are made.
        model: the adapted model, trained or not.
        adapter: what `adapt` or `load_adapter` returned beside it.

    Returns:
        The number of bytes of the two files.

    Raises:
        UserError: if the folder holds something else, or cannot be written, or the model has not the adapter's updates.
    """
    parts = parts_of(model, adapter)
    require_unscaled(parts)
    tensors = {
        f"{_prefix(path, part)}/{name}": np.asarray(variable[...])
        for path, _, part, _ in parts
        for name, variable in _fused(nnx.clone(part)).tensors().items()
    }
    _, trained, frozen = nnx.split(model, adapter.trainable, ...)
    for path, variable in nnx.to_flat_state(trained):
        if not isinstance(variable, AdapterParam):
            tensors[join(path)] = np.asarray(variable[...])
    payload = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in tensors.items()})
    config = {
        "format": FORMAT,
        "library": "surm_jax",
        **adapter.to_json(),
        "base": fingerprint(frozen),
    }
    config["sha256"] = _sha256(config, io.BytesIO(payload))
    text = json.dumps(config, indent=1).encode()
    write_folder(Path(folder), text, payload)
    return len(payload) + len(text)


def require_unscaled(parts: Iterable[tuple[str, str, Delta | Branch, nnx.Module]]) -> None:
    """Checks that parts of an adapter count as they were trained: files hold no scale.

    Raises:
        UserError: if `set_scale` or `set_active` says otherwise.
    """
    for path, name, part, _ in parts:
        if (scale := float(part.scale[...])) != 1:
            raise UserError(
                f"{path} has the adapter {name!r} at the scale {scale:g}, which files do not hold: save"
                f" set_scale(model, {name!r}, 1.0), and set the scale again where it is loaded"
            )


def write_folder(folder: Path, config: bytes, payload: bytes) -> None:
    """Writes the two files of an adapter folder, replacing one that is there in one step.

    Raises:
        UserError: if the folder holds something else, or cannot be written.
    """
    if folder.exists() and not (folder / CONFIG_NAME).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an adapter folder (no {CONFIG_NAME}): choose another name")
    if folder.is_dir() and (others := {path.name for path in folder.iterdir()} - {CONFIG_NAME, TENSORS_NAME}):
        raise UserError(f"{folder} holds {min(others)} besides an adapter, which would be lost: choose another name")
    try:
        with replacing_folder(folder) as temporary:
            (temporary / TENSORS_NAME).write_bytes(payload)
            (temporary / CONFIG_NAME).write_bytes(config)
    except OSError as error:
        raise UserError(f"cannot write the adapter folder {folder}: {error.strerror or error}") from None


def load_adapter(
    folder: str | os.PathLike, model: nnx.Module, *, name: str = DEFAULT_NAME, execution: str = "auto"
) -> tuple[nnx.Module, Adapter]:
    """Returns a base model with an adapter from a folder, and the adapter's recipe.

    `model` itself stays as it is. What the folder does not hold comes from `model`, and must be what the adapter was
    trained on, bit for bit.

    Args:
        folder: what `save_adapter` wrote.
        model: the base model, with a head of the adapter's shape. It may have adapters of other names.
        name: what the adapter is called in the model.
        execution: how the updates are computed, as in `adapt`.

    Raises:
        UserError: naming what is missing, damaged, of another shape, or of another base.
    """
    model, adapter, base = read_adapter(folder, model, name=name, execution=execution)
    _, _, frozen = nnx.split(model, adapter.trainable, ...)
    check_fingerprint(fingerprint(frozen), base, f"the adapter {folder}")
    return model, adapter


def read_adapter(
    folder: str | os.PathLike, model: nnx.Module, *, name: str = DEFAULT_NAME, execution: str = "auto"
) -> tuple[nnx.Module, Adapter, dict[str, str]]:
    """Does what `load_adapter` does, but for the check of the base, and returns its fingerprint as well.

    Raises:
        UserError: naming what is missing, damaged or of another shape.
    """
    folder = Path(folder)
    config, adapter = _read_config(folder, name)
    _require_intact(folder, config)
    tensors = TensorFile(folder / TENSORS_NAME)
    model = nnx.clone(model)
    for path, module, rule in matched_modules(model, adapter):
        make = functools.partial(make_part, rule, path, module, execution)
        try:
            part = nnx.eval_shape(lambda key, make=make: _fused(make(key)), jax.random.key(0))
        except UserError as error:
            raise UserError(f"{folder / CONFIG_NAME}: {path or 'the model'} cannot be adapted: {error}") from None
        for key, variable in part.tensors().items():
            array = tensors.take(f"{_prefix(path, part)}/{key}", variable.shape)
            variable.set_value(jnp.asarray(array.astype(variable.dtype)))
        part.scale.set_value(jnp.ones((), jnp.float32))
        attach(module, adapter.name, part)
    parameters = base_parameters(model)
    trained = [path for pattern in adapter.train for path in require_match(pattern, list(parameters), "parameter")]
    for path in dict.fromkeys(trained):
        variable = parameters[path]
        variable.set_value(jnp.asarray(tensors.take(path, variable.shape).astype(variable.dtype)))
    if tensors.left:
        name = min(tensors.left)
        raise UserError(
            f"{tensors.path} holds {name!r}, which the model has no place for{did_you_mean(name, parameters)}"
        )
    return model, adapter, config["base"]


def _read_config(folder: Path, name: str) -> tuple[dict[str, Any], Adapter]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"no adapter in {folder}: cannot read {path.name} (no such file)")
    config = read_json(path, _MOST_BYTES_OF_CONFIG)
    if config.get("library") != "surm_jax":
        raise UserError(f"{path} was not written by surm_jax")
    if config.get("format") != FORMAT:
        raise UserError(f"{path} has the format {config.get('format')!r}; this version reads {FORMAT}")
    if not isinstance(config.get("sha256"), str) or not isinstance(config.get("base"), dict):
        raise UserError(f"{path} is damaged: it lacks 'sha256' or 'base'")
    try:
        return config, Adapter.from_json(config, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _sha256(config: dict[str, Any], payload: IO[bytes]) -> str:
    """Of the tensor file, and of all of the configuration but this very sum."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    digest = hashlib.file_digest(payload, "sha256")
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def _require_intact(folder: Path, config: dict[str, Any]) -> None:
    path = folder / TENSORS_NAME
    size = require_file(path)
    try:
        with path.open("rb") as file:
            actual = _sha256(config, file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError as error:
        raise UserError(f"{folder / CONFIG_NAME} is damaged: {error}") from None
    if actual != config["sha256"]:
        raise UserError(
            f"{path} or {CONFIG_NAME} is damaged or was changed: together they do not give the SHA-256 in {CONFIG_NAME}"
            f" (the tensor file has {size:,} bytes)"
        )


def _fused(part: Delta | Branch) -> Delta | Branch:
    part.fuse()
    return part


def _prefix(path: str, part: Delta | Branch) -> str:
    slot = "delta" if isinstance(part, Delta) else "branch"
    return f"{path}/{slot}" if path else slot
