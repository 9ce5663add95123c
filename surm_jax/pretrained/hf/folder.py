"""Folders of Hugging Face transformers, in and out: `config.json` and `model.safetensors`, whole or in shards.

Which model a folder holds, and what its arrays are called, say the architectures in `hf_vision` and `hf_text`.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json, replacing_folder
from surm_jax.models import BertConfig
from surm_jax.paths import join
from surm_jax.pretrained.configs import MODELS, config_class, require_fields, require_same
from surm_jax.pretrained.hf import text as hf_text
from surm_jax.pretrained.hf import vision as hf_vision
from surm_jax.pretrained.hf.architecture import Architecture, Names
from surm_jax.pretrained.normalization import PREPROCESSOR_NAME, preprocessor_fields
from surm_jax.pretrained.rules import fill
from surm_jax.tensor_files import SUFFIX, TensorFile, open_shards, open_tensors, write_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({**hf_vision.ARCHITECTURES, **hf_text.ARCHITECTURES})
"""What can be read, by `model_type`."""


def read_config(path: Path, overrides: Mapping[str, Any]) -> tuple[type[nnx.Module], Any]:
    """Returns the class and the configuration of the model in a folder.

    Args:
        path: the folder, or a safetensors file beside its `config.json`.
        overrides: fields of our configuration to set instead of what is in `config.json`.

    Raises:
        UserError: `config.json` is missing or damaged, describes a model that there is none of here, or a field is
            unknown.
    """
    architecture, fields = read_architecture(path)
    require_fields(config_class(architecture.model), overrides)
    return architecture.model, _read_config(path, architecture, fields, overrides)


def read_architecture(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """Returns the architecture of the model in a folder, and what its `config.json` holds.

    Raises:
        UserError: `config.json` is missing or damaged, or its `model_type` is none of `ARCHITECTURES`.
    """
    config_path = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not config_path.is_file():
        raise UserError(
            f"{path} was not written by save_model, and there is no {config_path}, which says what a model of "
            "transformers is: pass a folder that holds both"
        )
    fields = read_json(config_path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"{config_path} says model_type = {model_type!r}; known are {sorted(ARCHITECTURES)}"
            f"{did_you_mean(str(model_type), ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type], fields


def read(
    path: Path, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
) -> dict[str, jax.Array]:
    """Reads the parameters of a model from a folder.

    The configuration in `config.json` is compared first (see `surm_jax.pretrained.configs.require_same`). Position
    embeddings are resized to the model's image size as transformers does.

    Args:
        path: the folder, or a safetensors file beside its `config.json`.
        config: of the model that is to be filled.
        targets: the parameters to read, by path.
        fresh: the parameters that the folder must not fill.

    Raises:
        UserError: the folder is damaged or incomplete, has pickles only, or was written for another model.
    """
    architecture, fields = read_architecture(path)
    # A head that is not read may be of any kind, and says how the body is read out.
    reads_head = any(target.startswith("head/") for target in targets)
    overrides = {} if reads_head else {name: getattr(config, name) for name in config.HEAD_FIELDS}
    if MODELS[type(config)] is not architecture.model:
        overrides = {}
    require_same(str(path), _read_config(path, architecture, fields, overrides), config, targets)
    rules, ignored = architecture.key_rules(config), architecture.ignored(config)
    with _open(path) as file:
        return fill(file.keys, file.read, targets, rules, ignore=ignored, fresh=fresh, origin=str(path))


def save_huggingface(
    folder: Path | str,
    model: nnx.Module,
    config: Any,
    labels: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Writes a model as a folder that `from_pretrained` of transformers reads: `config.json` and `model.safetensors`.

    The folder is complete or absent at every moment. Arrays keep their dtypes. There is one file whatever the size of
    the model: shards serve uploads, and nothing that reads folders needs them. Memory: a second copy of the model.

    Args:
        folder: where to; replaced if it holds such a model and nothing else.
        model: without adapters: merge them first.
        config: that the model was built from.
        labels: the names of the classes, in the order of the outputs.
        normalization: mean and standard deviation by channel of the pixels that the model was trained on, in [0, 1]
            before; written as `preprocessor_config.json`.
        files: copied beside the weights, such as those of the tokeniser.

    Raises:
        UserError: transformers has no such model, the model is not what its configuration says, labels do not fit, or
            the folder holds something else or cannot be written.
    """
    folder = Path(folder)
    _require_free(folder, {CONFIG_NAME, WEIGHTS_NAME, PREPROCESSOR_NAME, *(path.name for path in files)})
    architecture = _architecture_of(config)
    fields = architecture.write_config(config)
    if labels is not None:
        fields |= _label_fields(labels, config.num_classes)
    parameters = {join(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    _require_plain(parameters, config)
    tensors = dict(architecture.fillers(config))
    for path, variable in parameters.items():
        name, tensor = architecture.tensor_name(config, path)
        tensors[name] = tensor.write(np.asarray(variable[...]))
    # transformers casts everything to this one dtype: with bfloat16 it would round the norms.
    exact = all(array.dtype == jnp.bfloat16 for array in tensors.values())
    fields["dtype"] = "bfloat16" if exact else "float32"
    try:
        with replacing_folder(folder) as temporary:
            write_tensors(temporary / WEIGHTS_NAME, tensors, {"format": "pt"})
            (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n")
            if normalization is not None:
                preprocessor = preprocessor_fields(normalization, config.image_size)
                (temporary / PREPROCESSOR_NAME).write_text(json.dumps(preprocessor, indent=2) + "\n")
            for path in files:
                shutil.copyfile(path, temporary / path.name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def huggingface_names(config: Any) -> Names:
    """Returns what transformers calls the modules and arrays of a model, as adapters of peft name them.

    Args:
        config: that the model was built from.

    Raises:
        UserError: transformers has no such model.

    >>> from surm_jax.models import ViTConfig
    >>> huggingface_names(ViTConfig.from_variant("B/16", num_classes=10)).modules("blocks/0/mlp/up")
    ('vit.layers.0.mlp.fc1', 'vit.encoder.layer.0.intermediate.dense')
    """
    return Names(_architecture_of(config), config)


def _architecture_of(config: Any) -> Architecture:
    kind = hf_text if isinstance(config, BertConfig) else hf_vision
    return kind.architecture_of(config)


def _read_config(path: Path, architecture: Architecture, fields: dict[str, Any], overrides: Mapping[str, Any]) -> Any:
    try:
        return architecture.read_config(fields, overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"the {CONFIG_NAME} of {path} is damaged ({type(error).__name__}: {error})") from error


@contextmanager
def _open(path: Path) -> Iterator[TensorFile]:
    """Opens the weights of a folder, or a single file of weights."""
    if not path.is_dir():
        if re.search(r"-\d+-of-\d+$", path.stem):
            raise UserError(f"{path} is one of several shards: pass the folder {path.parent} instead")
        weights = path
    elif (path / WEIGHTS_NAME).is_file():
        weights = path / WEIGHTS_NAME
    elif (path / INDEX_NAME).is_file():
        weights = path / INDEX_NAME
    else:
        raise UserError(_no_weights(path))
    with (open_shards if weights.name == INDEX_NAME else open_tensors)(weights) as file:
        yield file


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    message = f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}"
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{message}, but {pickles[0]}: that is a pickle, and loading one can run any code. Convert it where you "
            "trust it, with transformers' `Auto...from_pretrained(folder).save_pretrained(folder)`, which writes "
            "safetensors, or fetch the safetensors of its repository"
        )
    files = [name for name in names if name.endswith(SUFFIX)]
    if files:
        return f"{message}, but {', '.join(files[:8])}: pass one of these files itself"
    return f"{message}; its files are {', '.join(names[:8])}"


def _require_free(folder: Path, ours: set[str]) -> None:
    """Raises a `UserError` if there is something else than our files under the name of a folder to be written."""
    if folder.is_dir():
        if other := sorted({path.name for path in folder.iterdir()} - ours):
            raise UserError(f"{folder} holds {other[0]!r}, which is not of a model: choose another name, or clear it")
    elif folder.exists():
        raise UserError(f"{folder} is a file: choose another name for the folder")


def _label_fields(labels: Sequence[str], num_classes: int) -> dict[str, dict[str, Any]]:
    if len(labels) != num_classes:
        raise UserError(f"the model has {num_classes} classes, but there are {len(labels)} labels")
    for label in labels:
        if not isinstance(label, str) or list(labels).count(label) > 1:
            raise UserError(f"labels must be different strings, got {label!r} {list(labels).count(label)} times")
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _require_plain(parameters: Mapping[str, nnx.Variable], config: Any) -> None:
    """Raises a `UserError` if parameters are not exactly those of the model that a configuration describes."""
    abstract = nnx.eval_shape(lambda: MODELS[type(config)](config, rngs=nnx.Rngs(0)))
    expected = {join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    if extra := sorted(parameters.keys() - expected.keys()):
        raise UserError(
            f"the model has {extra[0]!r}, which a {type(config).__name__} does not describe: if it is of an adapter, "
            "merge the adapter first (surm_jax.peft.merge)"
        )
    if missing := sorted(expected.keys() - parameters.keys()):
        raise UserError(f"the model lacks {missing[0]!r}, which its {type(config).__name__} describes")
    for path, shape in expected.items():
        if parameters[path].shape != shape:
            raise UserError(f"{path!r} has shape {parameters[path].shape}, but its configuration says {shape}")
