"""Save and load adapters. An adapter folder has two files, which together take some hundred kilobytes.

`adapter_model.safetensors` holds the arrays that the adapter adds, under the names `<layer>/delta/<array>` and
`<module>/branch/<array>`. They have their smallest form: a `CirculantPair`, for example, stores the n entries of `r1 *
r2`. The file also holds other trained parameters, such as the head, and the statistics that training moved, such as
running means, under their paths.

`adapter_config.json` holds the recipe (`Adapter.to_json`), the fingerprint of the frozen base model, and one SHA-256 of
everything else in both files.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from surm_jax.atomic import is_temporary, replacing_folder
from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json, require_file
from surm_jax.paths import join
from surm_jax.peft.adapt import base_parameters, claim_trained, make_part
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter
from surm_jax.peft.fingerprint import check_fingerprint, fingerprint, frozen_checksums, moved_statistics, statistics
from surm_jax.peft.lifecycle import parts_of
from surm_jax.peft.matched import MatchedModule, matched_modules
from surm_jax.peft.owners import claim, owners
from surm_jax.peft.parts.base import AdapterParam, AttachedPart, Part
from surm_jax.peft.parts.layers import attach
from surm_jax.peft.parts.stacks import compacted, scaled
from surm_jax.tensor_files import TensorFile

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
FORMAT = 3

_MOST_BYTES_OF_CONFIG = 2**22
"""The largest allowed size of `adapter_config.json` in bytes. Each fingerprint entry takes about 70 bytes."""


def save_adapter(folder: str | os.PathLike, model: nnx.Module, adapter: Adapter) -> int:
    """Write an adapter of a model to a folder. An adapter that is already in the folder is replaced.

    If the function is interrupted, it does not leave an incomplete folder.

    Args:
        folder: The folder to write. Missing parent folders are created.
        model: The adapted model, before or after training.
        adapter: The adapter.

    Returns:
        The total size of the two files in bytes.

    Raises:
        UserError: If the folder holds anything but an adapter, if it cannot be written, if the model does not have
            the adapter, if the adapter's scale is not 1, or if the frozen parameters are no longer those of the base
            model that got the adapter.
    """
    rows = parts_of(model, adapter)
    require_unscaled(rows)
    tensors: dict[str, nnx.Variable] = {}
    for row in rows:
        part = compacted(row.part)
        tensors |= {_tensor_name(row.path, part, name): variable for name, variable in part.tensors().items()}
    trained, frozen = _trained_and_frozen(model, adapter)
    tensors |= {path: variable for path, variable in trained.items() if not isinstance(variable, AdapterParam)}
    tensors |= {path: statistics(model)[path] for path in moved_statistics(model, adapter)}
    arrays = {name: np.asarray(variable[...], order="C") for name, variable in tensors.items()}
    payload = safetensors.numpy.save(arrays)
    config = {"format": FORMAT, "library": "surm_jax", **adapter.to_json(), "base": fingerprint(frozen)}
    config["base"] = {path: digest for path, digest in config["base"].items() if path not in tensors}
    config["sha256"] = _sha256(config, io.BytesIO(payload))
    text = json.dumps(config, indent=1).encode()
    write_folder(Path(folder), text, payload)
    return len(payload) + len(text)


def _trained_and_frozen(model: nnx.Module, adapter: Adapter) -> tuple[dict[str, nnx.Variable], nnx.State]:
    """Divide the variables of a model into those that an adapter trains, by path, and the state of all others."""
    _, trained, frozen = nnx.split(model, adapter.trainable, ...)  # type: ignore[misc]  # `...` selects the rest
    return {join(path): variable for path, variable in nnx.to_flat_state(trained)}, frozen


def require_unscaled(rows: Iterable[AttachedPart]) -> None:
    """Check that the parts of an adapter have the scale 1, since adapter files do not store scales.

    Raises:
        UserError: If a part has another scale, which `set_scale` or `set_active` has set.
    """
    for row in rows:
        scales = np.asarray(row.part.scale[...])
        if (scales != 1).any():
            scale = float(scales.flat[0])
            raise UserError(
                f"{row.path} has the adapter {row.name!r} at the scale {scale:g}, which files do not hold: save"
                f" set_scale(model, {row.name!r}, 1.0), and set the scale again where it is loaded"
            )


def write_folder(folder: Path, config: bytes, payload: bytes) -> None:
    """Write the two files of an adapter folder. An existing adapter folder is replaced.

    Raises:
        UserError: If the folder holds anything but an adapter, or cannot be written.
    """
    there = {path.name for path in folder.iterdir() if not is_temporary(path)} if folder.is_dir() else set()
    # A process that was killed while it replaced an adapter has left a temporary folder, and perhaps no configuration.
    killed = folder.is_dir() and len(there) < len(list(folder.iterdir()))
    if (folder.exists() and not folder.is_dir()) or (there and CONFIG_NAME not in there and not killed):
        raise UserError(f"{folder} exists and is not an adapter folder (no {CONFIG_NAME}): choose another name")
    if others := there - {CONFIG_NAME, TENSORS_NAME}:
        raise UserError(f"{folder} also holds {min(others)}, which would be lost: choose another name")
    try:
        with replacing_folder(folder, CONFIG_NAME) as temporary:
            (temporary / TENSORS_NAME).write_bytes(payload)
            (temporary / CONFIG_NAME).write_bytes(config)
    except OSError as error:
        raise UserError(f"cannot write the adapter folder {folder}: {error.strerror or error}") from None


def load_adapter(
    folder: str | os.PathLike, model: nnx.Module, *, name: str = DEFAULT_NAME, execution: str = "auto"
) -> tuple[nnx.Module, Adapter]:
    """Load an adapter from a folder, and return a copy of the base model with this adapter. `model` is not changed.

    The folder holds only the adapter and the other trained parameters. All frozen parameters are taken from `model`.
    They must be equal, bit for bit, to those of the base model that the adapter was trained on.

    Args:
        folder: A folder that `save_adapter` wrote.
        model: The base model. It may have other adapters. If the head was trained, the head of `model` must have the
            same shape.
        name: The name that the adapter gets in the model.
        execution: How structured updates are computed, as in `adapt`.

    Returns:
        The adapted model and the adapter.

    Raises:
        UserError: If a file is missing or damaged, if an array is missing or has the wrong shape, or if the adapter was
            trained on another base model. The message says what is wrong.
    """
    model, adapter, base = read_adapter(folder, model, name=name, execution=execution)
    owned = owners(model)  # What another adapter trained of the base model is not what this adapter was trained on.
    mine = {path for path, owner in owned.items() if owner == adapter.name}
    _, frozen = _trained_and_frozen(model, adapter)
    actual = {path: digest for path, digest in fingerprint(frozen).items() if path not in owned}
    expected = {path: digest for path, digest in base.items() if path in mine or path not in owned}
    check_fingerprint(actual, expected, f"the adapter {folder}")
    return model, adapter


def read_adapter(
    folder: str | os.PathLike, model: nnx.Module, *, name: str = DEFAULT_NAME, execution: str = "auto"
) -> tuple[nnx.Module, Adapter, dict[str, str]]:
    """Load an adapter like `load_adapter`, but do not check whether `model` is the base model of the adapter.

    Returns:
        The adapted model, the adapter, and the fingerprint of the base model that the adapter was trained on.

    Raises:
        UserError: If a file is missing or damaged, or if an array is missing or has the wrong shape. The message says
            what is wrong.
    """
    folder = Path(folder)
    config, adapter = _read_config(folder, name)
    _require_intact(folder, config)
    tensors = TensorFile(folder / TENSORS_NAME)
    model = nnx.clone(model)
    for matched in matched_modules(model, adapter):
        try:
            part = nnx.eval_shape(functools.partial(_compact_part, matched, execution), jax.random.key(0))
        except UserError as error:
            place = matched.path or "the model"
            raise UserError(f"{folder / CONFIG_NAME}: {place} cannot be adapted: {error}") from None
        for key, variable in part.tensors().items():
            array = tensors.take(_tensor_name(matched.path, part, key), variable.shape)
            variable.set_value(jnp.asarray(array.astype(variable.dtype)))
        scaled(part, 1.0)
        attach(matched.module, adapter.name, part)
    moved = {path: variable for path, variable in statistics(model).items() if path in tensors.left}
    claim(moved, moved, adapter.name)
    for path, variable in (claim_trained(model, adapter) | moved).items():
        variable.set_value(jnp.asarray(tensors.take(path, variable.shape).astype(variable.dtype)))
    if tensors.left:
        left = min(tensors.left)
        near = did_you_mean(left, base_parameters(model))
        raise UserError(f"{tensors.path} holds {left!r}, but the model has no such array{near}")
    return model, dataclasses.replace(adapter, base=frozen_checksums(model, adapter)), config["base"]


def _read_config(folder: Path, name: str) -> tuple[dict[str, Any], Adapter]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"no adapter in {folder}: cannot read {path.name} (no such file)")
    config = read_json(path, _MOST_BYTES_OF_CONFIG)
    if config.get("library") != "surm_jax":
        raise UserError(f"{path} was not written by surm_jax")
    found = config.get("format")
    if found in (1, 2):
        raise UserError(
            f"{path} has the adapter format {found}, which an earlier version of surm_jax wrote; this version reads"
            f" {FORMAT}. Train the adapter again, or load it with the version that wrote it and merge it"
        )
    if found != FORMAT:
        raise UserError(f"{path} has the adapter format {found!r}; this version reads {FORMAT}")
    if not isinstance(config.get("sha256"), str) or not isinstance(config.get("base"), dict):
        raise UserError(f"{path} is damaged: it lacks 'sha256' or 'base'")
    try:
        return config, Adapter.from_json(config, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _sha256(config: dict[str, Any], payload: BinaryIO) -> str:
    """Return the SHA-256 of the tensor file followed by the JSON configuration without its entry "sha256"."""
    rest = {key: value for key, value in config.items() if key != "sha256"}
    digest = hashlib.file_digest(payload, "sha256")  # type: ignore[arg-type]  # any binary file will do
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


def _compact_part(matched: MatchedModule, execution: str, key: jax.Array) -> Part:
    return compacted(make_part(matched, execution, key))


def _tensor_name(path: str, part: Part, name: str) -> str:
    return f"{path}/{part.slot}/{name}" if path else f"{part.slot}/{name}"
