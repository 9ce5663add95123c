"""Serving many adapters in one batch: each example selects its adapter, and one compiled program serves all of them.

A bank stacks the arrays of adapters with the same methods to shape (adapters, ...). Each example gathers its own
adapter's arrays when the product is computed. For a circulant this is one vector of n numbers, and its Fourier
transform costs as much as that of one more token.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.peft.adapt import base_parameters
from surm_jax.peft.files import check_fingerprint, fingerprint, read_adapter
from surm_jax.peft.kernels import check_call, is_linear, kernel_matrix, matrix_view
from surm_jax.peft.lifecycle import adapter_names
from surm_jax.peft.parts.banked import BankedKernelPart, BankedOutputPart
from surm_jax.peft.parts.base import KERNEL, Part, iter_parts
from surm_jax.peft.parts.layers import attach

T = TypeVar("T")

BANK = "bank"
"""The adapter name under which a bank's parts are attached to a model."""

Folders = Sequence[str | os.PathLike]


class _Content(NamedTuple):
    """The content of one adapter folder, compared with the base model.

    Attributes:
        parts: The adapter's parts in the form that a bank stacks, by (path, slot).
        kernels: The changes of fully trained kernels, each (in, out), by the layer's path.
        biases: The changes of trained biases, each (out,), by the layer's path.
    """

    parts: dict[tuple[str, str], Part]
    kernels: dict[str, Array]
    biases: dict[str, Array]


def load_bank(folders: Folders, model: nnx.Module) -> nnx.Module:
    """Return a copy of a base model that applies a different adapter, loaded from a folder, to each example.

        model = surm_jax.load_bank(["adapters/anna", "adapters/bert"], base)
        with surm_jax.adapter_of_examples(jnp.array([0, 1, 1, 0])):
            logits = model(images)

    A module may be changed by only some of the adapters. Fully trained linear layers, such as the head, are also
    selected for each example. Dropout is off.

    Args:
        folders: The folders of adapters that were trained on this base model with the same methods. An example with
            the number i gets the adapter of `folders[i]`. A number without a folder is an error; in a compiled
            function, which cannot raise it, the output of that example is NaN.
        model: The base model, without adapters.

    Raises:
        UserError: If a folder cannot be loaded (`load_adapter`); if adapters have parts of different forms in the same
            module; if a parameter was trained that does not belong to a linear layer; or if the model has adapters.
    """
    if isinstance(folders, str | os.PathLike):
        raise UserError(f"folders must be a list, got one: write [{str(folders)!r}]")
    if names := adapter_names(model):
        raise UserError(f"a bank needs a base model without adapters, and this one has {', '.join(names)}")
    if not folders:
        raise UserError("load_bank needs at least one adapter folder")
    base = fingerprint(nnx.state(model))  # once, since it reads all weights
    contents = [_read(model, base, folder) for folder in folders]
    result = nnx.clone(model)
    modules = {join(path): module for path, module in nnx.iter_modules(result)}
    for path in sorted({path for content in contents for path in _changed(content)}):
        check_call(modules[path], path, KERNEL)
        part = BankedKernelPart(
            len(folders),
            matrix_view(modules[path], path).shape,
            parts=_same_form(path, KERNEL, folders, contents),
            kernels=_rows(path, [content.kernels for content in contents]),
            biases=_rows(path, [content.biases for content in contents]),
        )
        attach(modules[path], BANK, part)
    for path, slot in sorted({key for content in contents for key in content.parts if key[1] != KERNEL}):
        parts = _same_form(path, slot, folders, contents)
        if parts:
            attach(modules[path], BANK, BankedOutputPart(parts))
    return result


def _changed(content: _Content) -> set[str]:
    """Return the paths of the linear layers that an adapter changes by a kernel part, a kernel or a bias."""
    return {path for path, slot in content.parts if slot == KERNEL} | {*content.kernels, *content.biases}


def _rows(path: str, tables: Sequence[Mapping[str, Array]]) -> list[Array] | None:
    """Return each adapter's array at a path, with zeros for adapters without one; `None` if all are without."""
    found = [table[path] for table in tables if path in table]
    return [table.get(path, jnp.zeros_like(found[0])) for table in tables] if found else None


def _same_form(path: str, slot: str, folders: Folders, contents: Sequence[_Content]) -> Sequence[Part] | None:
    """Return each adapter's part of a module; `None` if no adapter has one.

    An adapter without such a part gets a copy of another adapter's part, switched off.

    Raises:
        UserError: If two parts differ in more than the values of their arrays.
    """
    found = [content.parts.get((path, slot)) for content in contents]
    first = next((part for part in found if part is not None), None)
    if first is None:
        return None
    switched_off = nnx.clone(first)
    switched_off.scale[...] = jnp.zeros((), jnp.float32)
    parts = type(first).alike([switched_off if part is None else part for part in found])
    for folder, part in zip(folders, parts, strict=True):
        if _structure(part) != _structure(parts[0]):
            raise UserError(f"{folder}: {path} has {part.form()}, but another adapter of the bank {parts[0].form()}")
    return parts


def _structure(part: Part) -> tuple[nnx.GraphDef, list[tuple[int, ...]]]:
    """Return everything about a part except the values of its arrays. Parts can be stacked if this is equal."""
    graphdef, state = nnx.split(part)
    return graphdef, [np.shape(leaf) for leaf in jax.tree.leaves(state)]


def _read(model: nnx.Module, base: Mapping[str, str], folder: str | os.PathLike) -> _Content:
    """Read an adapter folder, check that it belongs to the base model, and return its content."""
    loaded, adapter, expected = read_adapter(folder, model)
    _, _, frozen = nnx.split(loaded, adapter.trainable, ...)  # type: ignore[misc]  # `...` selects the rest
    paths = {join(path) for path, _ in nnx.to_flat_state(frozen)}
    check_fingerprint({path: base[path] for path in base.keys() & paths}, expected, f"the adapter {folder}")
    parts = {
        (row.path, row.part.slot): row.part.for_bank(
            kernel_matrix(row.module, row.path) if row.part.slot == KERNEL else None
        )
        for row in iter_parts(loaded)
    }
    return _Content(parts, *_trained_layers(model, loaded, folder))


def _trained_layers(
    base: nnx.Module, loaded: nnx.Module, folder: str | os.PathLike
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the changes of kernels and of biases, by layer, in the linear layers that were fully trained.

    Raises:
        UserError: If another kind of parameter was trained.
    """
    before, after = base_parameters(base), base_parameters(loaded)
    changed = [path for path, variable in after.items() if variable.get_value() is not before[path].get_value()]
    modules = {join(path): module for path, module in nnx.iter_modules(base)}
    kernels, biases = {}, {}
    for path in changed:
        layer, _, name = path.rpartition("/")
        if layer not in modules or not is_linear(modules[layer]) or name not in ("kernel", "bias"):
            raise UserError(f"{folder}: {path} was trained, and only linear layers can be served together")
        shape = matrix_view(modules[layer], layer).shape
        change = after[path][...].astype(jnp.float32) - before[path][...].astype(jnp.float32)
        if name == "kernel":
            kernels[layer] = change.reshape(shape)
        else:
            biases[layer] = change.reshape(shape[1])
    return kernels, biases
