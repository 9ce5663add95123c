"""Read an adapter from a folder of Hugging Face's peft."""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import join, matching
from surm_jax.peft.adapt import base_parameters, claim_trained
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter, Rule
from surm_jax.peft.files import CONFIG_NAME, TENSORS_NAME
from surm_jax.peft.fingerprint import frozen_checksums
from surm_jax.peft.hf.format import FORMATS, Format
from surm_jax.peft.hf.names import ROOT, ModuleNames, whole_modules
from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.kernels import kernel_of
from surm_jax.peft.matched import matched_modules
from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.base import Place
from surm_jax.peft.parts.layers import attach
from surm_jax.structured import StructuredMatrix
from surm_jax.tensor_files import TensorFile


def load_peft(
    folder: str | os.PathLike,
    model: nnx.Module,
    names: ModuleNames,
    *,
    name: str = DEFAULT_NAME,
    execution: str = "auto",
) -> tuple[nnx.Module, Adapter]:
    """Return a copy of a base model with an adapter that is read from a folder of Hugging Face's peft.

    `model` is not changed. LoRA (with or without `use_rslora`), C3A, GraLoRA and LoKr on linear layers are supported.
    Modules that were trained as a whole (`modules_to_save`) are read too. The folder may name modules as transformers
    5.24 does, or as earlier versions and checkpoints on the Hub do. A folder of peft does not identify the base
    weights, so this function cannot check that the adapter was trained on `model`.

    The folder may come from an untrusted source. Nothing in it is executed, no link in it is followed, and a tensor is
    read only after its shape was checked.

    Args:
        folder: A folder that peft's `save_pretrained` or our `save_peft` wrote.
        model: The base model. If the folder holds a trained head, the model's head must have the same shape. The model
            may have other adapters.
        names: The names that transformers gives to the modules of the model, as `huggingface_names(model.config)`
            returns them.
        name: The name of the adapter in the returned model.
        execution: How the updates are computed, as in `adapt`.

    Returns:
        The adapted model and the adapter.

    Raises:
        UserError: If a setting or tensor has no counterpart in surm_jax or is damaged, or if a tensor is missing, has
            the wrong shape, or belongs to no module of the model.
    """
    folder = Path(folder)
    settings = Settings(folder / CONFIG_NAME)
    peft_type = settings.values.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in FORMATS:
        known = f"which is none of the known types: {', '.join(FORMATS)}{did_you_mean(str(peft_type), FORMATS)}"
        raise settings.refusal("peft_type", known)
    form = FORMATS[peft_type]
    settings.refuse_others(form.settings)
    model = nnx.clone(model)
    tensors = _Tensors(folder)
    updates, matrices = _read_updates(form, settings, tensors, model, names)
    train = _read_modules(settings, tensors, model, names, updates)
    tensors.refuse_rest(form.mark, model, names)
    if not updates:
        raise UserError(f"{tensors.path} holds no update of a linear layer")
    adapter = Adapter(_rules(updates, model), train, name)
    for path, layer, *_ in matched_modules(model, adapter):
        matrix = matrices[path]
        place = Place(matrix.shape[1], kernel_of(layer, path).matrices(), execution=execution)
        attach(layer, name, updates[path].part_with(matrix, place))
    claim_trained(model, adapter)
    return model, dataclasses.replace(adapter, base=frozen_checksums(model, adapter))


class _Tensors:
    """The tensors of an adapter folder of peft, each of which must be read exactly once.

    `take` reads a tensor, and `refuse_rest` raises an error if any is left. Both take names without the prefix `ROOT`,
    with which all names in the file begin.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TENSORS_NAME
        if not self.path.is_file() and (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder} has its tensors in adapter_model.bin, a pickle, which may run any code and is not read:"
                f" load the adapter with peft and save it again, as {TENSORS_NAME}"
            )
        self._file = TensorFile(self.path)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the tensor with a name, after checking its shape. Each tensor can be read once.

        Raises:
            UserError: If there is no such tensor, or it does not have this shape. See `TensorFile.take`.
        """
        return self._file.take(ROOT + name, shape)

    def has(self, prefix: str) -> bool:
        """Return whether the name of any tensor that was not read yet begins with `prefix`."""
        return any(name.startswith(ROOT + prefix) for name in self._file.left)

    def refuse_rest(self, mark: str, model: nnx.Module, names: ModuleNames) -> None:
        """Check that every tensor in the folder was read.

        Args:
            mark: The text by which tensors of the folder's format are recognised, such as "lora_" (`Format.mark`).
            model: The base model.
            names: The names that transformers gives to the modules of the model.

        Raises:
            UserError: If a tensor was not read. The message says why it belongs to no linear layer of the model.
        """
        if not self._file.left:
            return
        name = min(self._file.left)
        text = f"{self.path} holds {name!r}"
        if not name.startswith(ROOT):
            raise UserError(f"{text}, but the names of peft's tensors begin with {ROOT}")
        paths = {found: path for path in _modules(model) for found in names.modules(path)}
        module = name.removeprefix(ROOT).partition(f".{mark}")[0].removesuffix(".weight").removesuffix(".bias")
        if module not in paths:
            raise UserError(f"{text}, but the model has no module {module!r}{did_you_mean(module, paths)}")
        if not _is_linear(_modules(model)[paths[module]]):
            kind = type(_modules(model)[paths[module]]).__name__
            raise UserError(f"{text}, but {module} ({paths[module]} here) is no linear layer: it is {kind}")
        raise UserError(f"{text}, which has no counterpart in the linear layer {paths[module]}")


def _is_linear(module: nnx.Module) -> bool:
    return isinstance(module, nnx.Linear | nnx.LinearGeneral)


def _modules(model: nnx.Module) -> dict[str, nnx.Module]:
    return {join(path): module for path, module in nnx.iter_modules(model)}


def _read_updates(
    form: Format, settings: Settings, tensors: _Tensors, model: nnx.Module, names: ModuleNames
) -> tuple[dict[str, Update], dict[str, StructuredMatrix]]:
    """Return the method and the matrix of each layer that has tensors in the folder, both by the path of the layer.

    Raises:
        UserError: If `target_modules` selects a layer without tensors, or a tensor or setting has no counterpart in
            surm_jax.
    """
    layers = {path: layer for path, layer in sorted(_modules(model).items()) if _is_linear(layer)}
    called = {path: names.modules(path) for path in layers}
    held = {
        path: [place for place, name in enumerate(found) if tensors.has(f"{name}.{form.mark}")]
        for path, found in called.items()
    }
    # Versions of transformers use different names, and `names.modules` returns one name for each version. The layers
    # with tensors show which version's names this file uses.
    versions = {place for path, places in held.items() for place in places if len(called[path]) > 1}
    updates, matrices = {}, {}
    for path, layer in layers.items():
        found = called[path]
        if not held[path]:
            for place, name in enumerate(found):
                current = len(found) == 1 or not versions or place in versions
                if current and settings.targets(name) and not settings.saves(name):
                    raise UserError(f"{tensors.path} has no update of {path}, although target_modules names {name}")
            continue
        module = found[held[path][0]]
        shape = kernel_of(layer, path).layout.matrix
        updates[path], shapes = form.read_settings(settings, module, shape)
        arrays = {part: tensors.take(f"{module}.{part}", size).astype(np.float32) for part, size in shapes.items()}
        try:
            matrices[path] = form.read(arrays)
        except UserError as error:
            raise UserError(f"the update of {path} in {tensors.path.parent} has no counterpart here: {error}") from None
    return updates, matrices


def _read_modules(
    settings: Settings, tensors: _Tensors, model: nnx.Module, names: ModuleNames, adapted: Collection[str]
) -> tuple[str, ...]:
    """Copy the modules that the folder holds as a whole (`modules_to_save`) into `model`.

    Layers with paths in `adapted` already have an update, and are skipped.

    Returns:
        Patterns that match the paths of the copied parameters.
    """
    modules, read = whole_modules(base_parameters(model), names), []
    for path in sorted(modules.keys() - set(adapted)):
        found = names.modules(path)
        module = next((name for name in found for part in modules[path] if tensors.has(f"{name}.{part}")), None)
        if module is None:
            if any(settings.saves(name) for name in found):
                raise UserError(f"{tensors.path} lacks {ROOT}{found[0]}.*, although modules_to_save names it")
            continue
        read.append(path)
        for part, (variable, layout) in modules[path].items():
            theirs = jax.eval_shape(layout.write, jax.ShapeDtypeStruct(variable.shape, variable.dtype))
            array = layout.read(tensors.take(f"{module}.{part}", theirs.shape), variable.shape)
            variable.set_value(jnp.asarray(array.astype(variable.dtype)))
    return tuple(f"{pattern}/.*" for pattern in _patterns(read, list(modules)))


def _rules(updates: Mapping[str, Update], model: nnx.Module) -> tuple[Rule, ...]:
    """Return rules that give each layer in `updates` its method. They match no other linear layer of the model."""
    linear = [path for path, module in _modules(model).items() if _is_linear(module)]
    groups: dict[Update, list[str]] = {}
    for path, update in updates.items():
        groups.setdefault(update, []).append(path)
    return tuple(Rule("|".join(_patterns(paths, linear)), update) for update, paths in groups.items())


def _patterns(paths: Sequence[str], of: Sequence[str]) -> list[str]:
    """Return patterns that match all paths in `paths` and no other path in `of`.

    Where possible, one pattern matches the same layer in all blocks.
    """
    patterns = []
    for path in paths:
        literal = re.escape(path)
        general = re.sub(r"\d+", r"\\d+", literal)
        patterns.append(general if set(matching(general, of)) <= set(paths) else literal)
    return list(dict.fromkeys(patterns))
