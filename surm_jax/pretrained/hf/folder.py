"""Read and write folders of Hugging Face transformers.

A folder holds the configuration in `config.json` and the weights in `model.safetensors`. In a folder to read, the
weights may also be split into several files (shards). The registered `Architecture`s say which class of model a folder
holds, and how its arrays are named.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.atomic import is_temporary, replacing_folder
from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json
from surm_jax.models import Config, Model, model_class
from surm_jax.paths import join
from surm_jax.preparation import Preparation
from surm_jax.pretrained.checkpoint import Checkpoint, bounded, reads_head, require_same
from surm_jax.pretrained.hf.architecture import ARCHITECTURES, Architecture, Names, architecture_of
from surm_jax.pretrained.image_processor import PREPROCESSOR_NAME, processor_file, read_processor, write_processor
from surm_jax.pretrained.rules import fill
from surm_jax.tensor_files import SUFFIX, ShardedTensors, TensorFile, write_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HuggingFaceCheckpoint(Checkpoint):
    """A checkpoint of transformers: a folder, or a safetensors file beside its `config.json`.

    `config.json` is read when it is first needed, and then kept. The files of weights in a folder are opened by `fill`.
    """

    def __init__(self, path: Path, file: TensorFile | None = None) -> None:
        """Create the checkpoint without reading any file.

        Args:
            path: The path of the folder, or of a single file of weights.
            file: The open file of weights, if `path` is a file.

        Raises:
            UserError: The file is one of several shards.
        """
        if file is not None and re.search(r"-\d+-of-\d+$", path.stem):
            raise UserError(f"{path} is one of several shards: pass the folder {path.parent} instead")
        self.path, self._file = path, file

    def config(self, variant: str | None, overrides: Mapping[str, Any]) -> Config:
        """Return our configuration of the model that `config.json` describes, with fields replaced by the overrides."""
        self._refuse_variant(variant)
        return self._config(overrides)

    def fill(
        self, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
    ) -> dict[str, jax.Array]:
        """Read the parameters of a model, whose configuration must agree with `config.json` (see `require_same`).

        Position embeddings are resized to the model's image size by bicubic interpolation, as in transformers.

        Raises:
            UserError: The folder is damaged or incomplete, holds only pickles, or was written for another model.
        """
        architecture, _ = self._described
        # If the head is not read, the fields that describe the head and the pooling may differ from the model's.
        fields = () if reads_head(targets) or model_class(config) is not architecture.model else config.HEAD_FIELDS
        stored = self._config({name: getattr(config, name) for name in fields})
        require_same(str(self.path), stored, config, targets)
        rules, ignored = architecture.key_rules(config), architecture.ignored(config)
        with nullcontext(self._file) if self._file is not None else _open_weights(self.path) as file:
            _require_copies(file, architecture.copies(config), self.path)
            return fill(file.keys, file.read, targets, rules, ignore=ignored, fresh=fresh, origin=str(self.path))

    def preparation(self) -> Preparation:
        """Return the preparation of images that the folder's image processor describes.

        Without settings of an image processor, which transformers refuses, images are resized to a square, and
        normalised as the published models of this `model_type` expect.
        """
        architecture, fields = self._described
        if found := processor_file(_folder_of(self.path)):
            return read_processor(*found, fields.get("image_processor_type") or architecture.processor)
        return Preparation(normalization=architecture.normalization) if architecture.normalization else Preparation()

    @cached_property
    def _described(self) -> tuple[Architecture, dict[str, Any]]:
        return read_architecture(self.path)

    def _config(self, overrides: Mapping[str, Any]) -> Config:
        architecture, fields = self._described
        try:
            return bounded(architecture.read_config(fields, overrides))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise UserError(f"the {CONFIG_NAME} of {self.path} is damaged ({type(error).__name__}: {error})") from error


def read_architecture(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of the model in a folder, and the content of its `config.json`.

    Args:
        path: The path of the folder, or of a file in it.

    Raises:
        UserError: `config.json` is missing or damaged, or its `model_type` is not registered.
    """
    config_path = _folder_of(path) / CONFIG_NAME
    if not config_path.is_file():
        raise UserError(
            f"{path} was not written by save_model, and there is no {config_path}, which describes a model of "
            "transformers: pass a folder that holds both"
        )
    fields = read_json(config_path)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"{config_path} says model_type = {model_type!r}; known are {sorted(ARCHITECTURES)}"
            f"{did_you_mean(str(model_type), ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type], fields


def save_huggingface(
    folder: Path | str,
    model: Model,
    *,
    labels: Sequence[str] | None = None,
    preparation: Preparation | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Write a model as a folder that `from_pretrained` of transformers reads, in `config.json` and `model.safetensors`.

    The folder is complete as soon as it holds `config.json`. Arrays keep their dtypes. The weights are written to one
    file of any size. The host needs memory for a second copy of the model.

    Args:
        folder: The path of the folder. An existing folder is replaced if all its files are files that this function
            writes.
        model: The model. It must not have adapters, so merge them into the model first.
        labels: The names of the classes, in the order of the model's outputs.
        preparation: How images were prepared for the model, which is written to `preprocessor_config.json`.
        files: The paths of files to copy into the folder, such as those of the tokenizer.

    Raises:
        UserError: transformers has no such model, the paths or shapes of the model's parameters do not fit its
            configuration, the labels are not different strings, one for each class, the folder holds other files, or it
            cannot be written.
    """
    folder = Path(folder)
    _require_free(folder, {CONFIG_NAME, WEIGHTS_NAME, PREPROCESSOR_NAME, *(path.name for path in files)})
    config = model.config
    architecture = architecture_of(config)
    fields = architecture.write_config(config)
    if labels is not None:
        fields |= _label_fields(labels, config.num_classes)
    parameters = {join(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    _require_plain(parameters, config)
    tensors = dict(architecture.fillers(config))
    for path, variable in parameters.items():
        name, tensor = architecture.tensor_name(config, path)
        tensors[name] = tensor.write(np.asarray(variable[...]))
    # When transformers loads the folder, it casts all arrays to this dtype. So it is bfloat16 only if all arrays are.
    # Otherwise float32 arrays, such as those of norms, would be rounded.
    exact = all(array.dtype == jnp.bfloat16 for array in tensors.values())
    fields["dtype"] = "bfloat16" if exact else "float32"
    try:
        with replacing_folder(folder, CONFIG_NAME) as temporary:
            write_tensors(temporary / WEIGHTS_NAME, tensors, {"format": "pt"})
            (temporary / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n")
            if preparation is not None:
                processor = write_processor(preparation.fitted(config.image_size), config.channels)
                (temporary / PREPROCESSOR_NAME).write_text(json.dumps(processor, indent=2) + "\n")
            for file in files:
                shutil.copyfile(file, temporary / file.name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def huggingface_names(config: Any) -> Names:
    """Return the names that transformers gives to the modules and arrays of a model, for adapters in peft's format.

    Args:
        config: The configuration that the model was built from.

    Raises:
        UserError: transformers has no such model.

    For each module, its attribute path in a loaded transformers model is first and its name in checkpoints is last:

    >>> from surm_jax.models import ViTConfig
    >>> huggingface_names(ViTConfig.from_variant("B/16", num_classes=10)).modules("blocks/0/mlp/up")
    ('vit.layers.0.mlp.fc1', 'vit.encoder.layer.0.intermediate.dense')
    """
    return Names(architecture_of(config), config)


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _open_weights(folder: Path) -> TensorFile | ShardedTensors:
    """Open the weights of a folder, which are in one file or in shards."""
    if (folder / WEIGHTS_NAME).is_file():
        return TensorFile(folder / WEIGHTS_NAME)
    if (folder / INDEX_NAME).is_file():
        return ShardedTensors(folder / INDEX_NAME)
    raise UserError(_no_weights(folder))


def _require_copies(file: TensorFile | ShardedTensors, copies: Mapping[str, str], path: Path) -> None:
    """Check that arrays which should be copies of others in the same checkpoint are equal to them.

    Raises:
        UserError: They differ.
    """
    for copy, original in copies.items():
        if {copy, original} <= {*file.keys} and not np.array_equal(file.read(copy), file.read(original)):
            raise UserError(
                f"{path} does not fit the model: {copy!r} differs from {original!r}, but the model has one for both"
            )


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
    """Check that a folder can be written: it is no file, and holds only files with names in `ours`.

    Raises:
        UserError: It cannot.
    """
    if folder.is_dir():
        if other := sorted({path.name for path in folder.iterdir() if not is_temporary(path)} - ours):
            raise UserError(
                f"{folder} holds {other[0]!r}, which does not belong to a model: choose another name, or clear it"
            )
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
    """Check that a model has exactly the parameters that a new model with its configuration has.

    Paths and shapes are compared. So a model with an adapter is refused, because its adapter adds parameters.

    Args:
        parameters: The parameters of the model, by path.
        config: The configuration of the model.

    Raises:
        UserError: It has others.
    """
    abstract = nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0)))
    expected = {join(path): variable.shape for path, variable in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    if extra := sorted(parameters.keys() - expected.keys()):
        raise UserError(
            f"the model has {extra[0]!r}, which a {type(config).__name__} does not describe: if it belongs to an "
            "adapter, merge that first (surm_jax.peft.merge)"
        )
    if missing := sorted(expected.keys() - parameters.keys()):
        raise UserError(f"the model lacks {missing[0]!r}, which its {type(config).__name__} describes")
    for path, shape in expected.items():
        if parameters[path].shape != shape:
            raise UserError(f"{path!r} has shape {parameters[path].shape}, but its configuration says {shape}")
