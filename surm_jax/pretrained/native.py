"""Our own model file: safetensors with the parameters' paths as names, and the model's configuration in the header."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import replacing
from surm_jax.models import ViTConfig
from surm_jax.paths import join
from surm_jax.pretrained.configs import MODELS, require_fields, require_same
from surm_jax.pretrained.position_embed import resize_position_embed
from surm_jax.pretrained.rules import KeyRule, fill
from surm_jax.tensor_files import SUFFIX, open_tensors, write_tensors

FORMAT = "surm_jax.model.1"


def save_model(
    path: Path | str,
    model: nnx.Module,
    config: Any,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Writes all parameters of a model, each in its dtype, and its configuration to one file, atomically.

    Args:
        path: ends in `.safetensors`; replaced if it exists.
        model: its `nnx.Param`s are written, named by their `/`-joined paths.
        config: the frozen dataclass that the model was built from.
        normalization: mean and standard deviation by channel of the pixels that the model was trained on, in [0, 1]
            before; those in [-1, 1] if left out. `image_normalization` reads them again.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"a model file ends in {SUFFIX!r}, got {path}")
    tensors = {
        join(keys): np.asarray(variable[...]) for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    header = {"format": FORMAT, "model": type(config).__name__, "config": json.dumps(dataclasses.asdict(config))}
    if normalization is not None:
        header["normalization"] = json.dumps([[*map(float, values)] for values in normalization])
    try:
        with replacing(path) as temporary:
            write_tensors(temporary, tensors, header)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def is_native(path: Path) -> bool:
    """Says whether a safetensors file was written by `save_model`.

    Raises:
        UserError: the file is damaged.
    """
    with open_tensors(path) as file:
        return file.header.get("format") == FORMAT


def read_normalization(path: Path) -> tuple[Any, Any] | None:
    """Returns mean and standard deviation in a file of `save_model`, of any type and size, or `None` without them.

    Raises:
        UserError: the header is damaged.
    """
    with open_tensors(path) as file:
        entry = file.header.get("normalization")
    try:
        mean, std = (None, None) if entry is None else json.loads(entry)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: no mean and std of pixels in its header ({error})") from None
    return None if entry is None else (mean, std)


def read_config(path: Path, overrides: Mapping[str, Any]) -> tuple[type[nnx.Module], Any]:
    """Returns the class and the configuration of the model in a file of `save_model`.

    Args:
        path: the file.
        overrides: fields to set instead of what is in the file.

    Raises:
        UserError: the header is damaged, or a field is unknown.
    """
    with open_tensors(path) as file:
        return _read_config(path, file.header, overrides)


def read(
    path: Path, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
) -> dict[str, jax.Array]:
    """Reads the parameters of a model from a file of `save_model`.

    The configuration in the file is compared first (see `surm_jax.pretrained.configs.require_same`). Position
    embeddings are resized to the model's image size, bilinearly as AugReg's are.

    Args:
        path: the file.
        config: of the model that is to be filled.
        targets: the parameters to read, by path.
        fresh: the parameters that the file must not fill.

    Raises:
        UserError: the file is damaged, is not of this format, or was written for another model.
    """
    with open_tensors(path) as file:
        _, stored = _read_config(path, file.header, {})
        require_same(str(path), stored, config, targets)
        return fill(file.keys, file.read, targets, _rules(config), fresh=fresh, origin=str(path))


def _rules(config: Any) -> tuple[KeyRule, ...]:
    same = KeyRule(r"(.+)", r"\1")
    if not isinstance(config, ViTConfig):
        return (same,)
    resize = partial(resize_position_embed, extra_tokens=config.extra_tokens)
    return KeyRule("position_embed", "position_embed", resize), same


def _read_config(path: Path, header: Mapping[str, str], overrides: Mapping[str, Any]) -> tuple[type[nnx.Module], Any]:
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by save_model: its header has format {header.get('format')!r}, not {FORMAT!r}"
        )
    classes = {config.__name__: (config, model) for config, model in MODELS.items()}
    name = header.get("model", "")
    if name not in classes:
        raise UserError(f"{path} holds a model of {name!r}; known are {sorted(classes)}{did_you_mean(name, classes)}")
    config, model = classes[name]
    require_fields(config, overrides)
    try:
        # Fields that are younger than the file have their defaults, which are what was there before them.
        stored = config(**json.loads(header["config"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the header of {path} is damaged: no configuration of a {model.__name__} ({error})") from error
    return model, dataclasses.replace(stored, **overrides)
