"""Write an adapter as a folder that Hugging Face's peft reads."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import matching
from surm_jax.peft.adapt import base_parameters
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.files import require_unscaled, write_folder
from surm_jax.peft.fingerprint import moved_statistics
from surm_jax.peft.hf.format import FORMATS, LayerUpdate
from surm_jax.peft.hf.names import ROOT, ModuleNames, whole_modules
from surm_jax.peft.lifecycle import parts_of
from surm_jax.peft.parts.base import KERNEL, AttachedPart

_MERGE = "merge the update into the model instead (surm_jax.merge, or --mode=merge)"


def save_peft(
    folder: str | os.PathLike, model: nnx.Module, adapter: Adapter, names: ModuleNames, *, base_model: str = ""
) -> None:
    """Write an adapter of a model as a folder that `peft.PeftModel.from_pretrained` reads.

    Low-rank updates are written as LoRA, block-circulant and square circulant updates as C3A, Kronecker products as
    LoKr, and grids of blocks of low rank as GraLoRA. Alpha is written as a setting if the format has such a setting,
    and is otherwise multiplied into the tensors. Other trained parameters are written as `modules_to_save`. In peft
    these are whole modules, so if the kernel of a layer was trained, its bias is written too. An existing adapter
    folder is replaced.

    The files name a module by its attribute path in a model that transformers 5.24 has loaded. For BERT, this path is
    the same in all versions. For other models, earlier versions may use the names in checkpoints on the Hub instead.
    Those names are then also listed in `target_modules`. To load the tensors with an earlier version, call
    `PeftModel.from_pretrained(..., key_mapping={name: earlier name, ...})`.

    Args:
        folder: The folder to write. Missing parent folders are created.
        model: The adapted model, trained or not.
        adapter: The adapter to write.
        names: The names that transformers gives to the modules of the model, as `huggingface_names(model.config)`
            returns them.
        base_model: The name of the base model on the Hugging Face Hub. It is written into the settings, where users of
            the adapter find it.

    Raises:
        UserError: If the adapter has no update, if an update or a trained parameter has no counterpart in peft, if the
            adapter's scale is not 1, or if the folder cannot be written or holds files that are not an adapter's.
    """
    rows = parts_of(model, adapter)
    if not rows:
        raise UserError(f"the adapter {adapter.name!r} has no update, and peft reads no adapter without an update")
    require_unscaled(rows)
    if moved := moved_statistics(model, adapter):
        raise UserError(f"training moved {moved[0]}, and peft stores no statistics: use surm_jax.save_adapter")
    found = [_update(row) for row in rows]
    updates = {_name(names, update.path): update for update in found}
    peft_type = _peft_type(updates)
    settings, arrays = FORMATS[peft_type].write(updates)
    saved = _saved_modules(model, adapter, names, [row.path for row in rows])
    tensors = {
        f"{ROOT}{module}.{part}": np.asarray(array, order="C")
        for module, parts in (arrays | saved).items()
        for part, array in parts.items()
    }
    others = [name for update in updates.values() for name in names.modules(update.path)[1:]]
    config = {
        "peft_type": peft_type,
        "task_type": None,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        # The list includes names in earlier versions of transformers. In peft, names that do not exist have no effect.
        "target_modules": [*updates, *others],
        "modules_to_save": list(saved) or None,
        **settings,
    }
    # The files that peft writes have this metadata too.
    payload = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    write_folder(Path(folder), json.dumps(config, indent=2, sort_keys=True).encode(), payload)


def _name(names: ModuleNames, path: str) -> str:
    found = names.modules(path)
    if not found:
        raise UserError(f"{path} has no name in transformers, so peft could not find it: {_MERGE}")
    return found[0]


def _update(row: AttachedPart) -> LayerUpdate:
    if row.part.stack:
        raise UserError(f"the part of {row.path} is a stack of matrices, which peft cannot store: {_MERGE}")
    try:
        factor, matrix = row.part.multiple()
    except UserError as error:
        advice = f": {_MERGE}" if row.part.slot == KERNEL else ""
        raise UserError(f"the part of {row.path} {error}, which peft cannot store{advice}") from None
    return LayerUpdate(row.path, matrix, factor)


def _peft_type(updates: Mapping[str, LayerUpdate]) -> str:
    """Return the `peft_type` of the format that can store all updates.

    Raises:
        UserError: If an update fits no format, or if the updates need several formats.
    """
    first: dict[str, str] = {}
    for update in updates.values():
        held = [peft_type for peft_type, form in FORMATS.items() if form.holds(update.matrix)]
        if not held:
            m, n = update.matrix.shape
            known = ", ".join(f"{peft_type}: {form.description}" for peft_type, form in FORMATS.items())
            raise UserError(
                f"the part of {update.path} is a {type(update.matrix).__name__} of {m} x {n}, for which peft has no"
                f" format (it has {known}): {_MERGE}"
            )
        first.setdefault(held[0], update.path)
    if len(first) > 1:
        kinds = " and ".join(f"{peft_type} ({path})" for peft_type, path in first.items())
        raise UserError(f"an adapter of peft can have only one kind of update, but this one needs {kinds}: {_MERGE}")
    return next(iter(first))


def _saved_modules(
    model: nnx.Module, adapter: Adapter, names: ModuleNames, adapted: Collection[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of the modules with trained parameters other than those of updates, in peft's layout.

    Args:
        model: The adapted model.
        adapter: The adapter. Its `train` lists patterns for these parameters.
        names: The names that transformers gives to the modules of the model.
        adapted: The paths of the layers that have an update.

    Returns:
        A dictionary that maps the name of each module in transformers to a second dictionary, which maps names such as
        "weight" to the arrays of the module.

    Raises:
        UserError: If such a module also has an update, or if peft cannot train it as a whole.
    """
    parameters = base_parameters(model)
    modules = whole_modules(parameters, names)
    saved: dict[str, dict[str, np.ndarray]] = {}
    for path in dict.fromkeys(path for pattern in adapter.train for path in matching(pattern, parameters)):
        module = path.rpartition("/")[0]
        if module in adapted:
            raise UserError(
                f"{path} is trained in a layer that also has an update, and peft does not allow both in one layer"
            )
        if module not in modules:
            raise UserError(f"{path} is trained, but peft trains whole modules, and transformers has no such module")
        saved[names.modules(module)[0]] = {
            name: layout.write(np.asarray(variable[...])) for name, (variable, layout) in modules[module].items()
        }
    return saved
