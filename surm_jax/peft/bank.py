"""Serving many adapters in one batch: each example selects its adapter, and one compiled program serves all of them.

A bank is a model with several adapters that use the same methods. Their arrays are stacked to the shape (adapters,
...), and each layer gathers those of every example's adapter. For a circulant, this is one array of shape (n,) for each
example, and its Fourier transform costs as much as that of one more token.
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
from surm_jax.peft.files import read_adapter
from surm_jax.peft.fingerprint import base_variables, check_fingerprint, fingerprint
from surm_jax.peft.kernels import check_product, check_slots, kernel_of
from surm_jax.peft.owners import adapter_names, owners
from surm_jax.peft.parts.banked import BankedKernelPart, BankedOutputPart
from surm_jax.peft.parts.base import KERNEL, Part, iter_parts
from surm_jax.peft.parts.layers import attach

T = TypeVar("T")

BANK = "bank"
"""The adapter name under which a bank's parts are attached to a model."""

Folders = Sequence[str | os.PathLike]


class _Content(NamedTuple):
    """What the adapter in one folder changes in the base model.

    Attributes:
        parts: The adapter's parts, after `Part.for_bank`, by the pair (path of the module, slot).
        kernels: The changes of trained kernels, of shape (in, out), by the path of the layer.
        biases: The changes of trained biases, of shape (out,), by the path of the layer.
    """

    parts: dict[tuple[str, str], Part]
    kernels: dict[str, Array]
    biases: dict[str, Array]


def load_bank(folders: Folders, model: nnx.Module) -> nnx.Module:
    """Load adapters from folders, and return a copy of the base model that applies one of them to each example.

        model = surm_jax.load_bank(["adapters/anna", "adapters/bert"], base)
        with surm_jax.adapter_of_examples(jnp.array([0, 1, 1, 0])):
            logits = model(images)

    Here, the first and the last image use the adapter in `adapters/anna`, and the other two that in `adapters/bert`.

    The adapters may change different modules. If an adapter also trained the kernel or the bias of a linear layer, such
    as the head, its examples use that kernel or bias. The dropout of the adapters is off.

    Args:
        folders: The folders of adapters that were trained on this base model with the same methods. An example whose
            index in `adapter_of_examples` is i uses the adapter in `folders[i]`. An index that is out of range raises
            an error. A compiled function cannot raise it, and returns NaN for that example instead.
        model: The base model, without adapters.

    Raises:
        UserError: If a folder cannot be loaded (`load_adapter`); if the parts of two adapters in the same module have
            different structures; if an adapter trained a parameter that does not belong to a linear layer; or if the
            model already has adapters.
    """
    if isinstance(folders, str | os.PathLike):
        raise UserError(f"folders must be a list, got one: write [{str(folders)!r}]")
    if names := adapter_names(model):
        raise UserError(f"a bank needs a base model without adapters, and this one has {', '.join(names)}")
    if not folders:
        raise UserError("load_bank needs at least one adapter folder")
    base = fingerprint(nnx.state(model))  # Compute this only once: it reads all weights.
    contents = [_read(model, base, folder) for folder in folders]
    result = nnx.clone(model)
    modules = {join(path): module for path, module in nnx.iter_modules(result)}
    for path in sorted({path for content in contents for path in _changed(content)}):
        check_slots(modules[path], path)
        check_product(modules[path], path)
        part = BankedKernelPart(
            len(folders),
            kernel_of(modules[path], path).layout.matrix,
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
    """Return the paths of the linear layers in which an adapter changes anything."""
    return {path for path, slot in content.parts if slot == KERNEL} | {*content.kernels, *content.biases}


def _rows(path: str, tables: Sequence[Mapping[str, Array]]) -> list[Array] | None:
    """Return what each adapter has for the layer at `path`, with zeros for adapters that have nothing.

    If no adapter has an array for this layer, return `None`.

    Args:
        path: The path of the layer.
        tables: For each adapter, a dictionary from the path of a layer to an array.
    """
    found = [table[path] for table in tables if path in table]
    return [table.get(path, jnp.zeros_like(found[0])) for table in tables] if found else None


def _same_form(path: str, slot: str, folders: Folders, contents: Sequence[_Content]) -> Sequence[Part] | None:
    """Return the parts of all adapters in one place of a model, so that they can be stacked, or `None` without any.

    An adapter without a part there gets a copy of another one, with the scale 0, so that it adds nothing.

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
    """Return the graph definition of a part and the shapes of its arrays. Parts with equal results can be stacked."""
    graphdef, state = nnx.split(part)
    return graphdef, [np.shape(leaf) for leaf in jax.tree.leaves(state)]


def _read(model: nnx.Module, base: Mapping[str, str], folder: str | os.PathLike) -> _Content:
    """Read the adapter in a folder, check that it was trained on this base model, and return what it changes.

    Args:
        model: The base model.
        base: The fingerprint of all parameters of the base model.
        folder: The adapter folder.

    Raises:
        UserError: If the folder cannot be loaded, or its adapter was trained on another base model.
    """
    loaded, _, expected = read_adapter(folder, model)
    frozen = {path: base[path] for path in base.keys() - owners(loaded).keys()}
    check_fingerprint(frozen, expected, f"the adapter {folder}")
    for path in [row.path for row in iter_parts(loaded) if row.part.stack]:
        raise UserError(
            f"{folder}: {path} holds several matrices, as a stack of layers does, and a bank serves single matrices:"
            " load one adapter at a time"
        )
    parts = {
        (row.path, row.part.slot): row.part.for_bank(
            kernel_of(row.module, row.path).matrices() if row.part.slot == KERNEL else None
        )
        for row in iter_parts(loaded)
    }
    return _Content(parts, *_trained_layers(model, loaded, folder))


def _trained_layers(
    base: nnx.Module, loaded: nnx.Module, folder: str | os.PathLike
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return how trained kernels and trained biases differ from the base model, as two dictionaries by layer path.

    Raises:
        UserError: If a trained parameter is not the kernel or bias of a linear layer, or if training moved a statistic.
    """
    before, after = (base_variables(model) for model in (base, loaded))
    modules = {join(path): module for path, module in nnx.iter_modules(base)}
    kernels, biases = {}, {}
    for path in owners(loaded):
        layer, _, name = path.rpartition("/")
        if layer not in modules or not isinstance(modules[layer], nnx.Linear | nnx.LinearGeneral):
            raise UserError(f"{folder}: {path} was trained, and only linear layers can be served together")
        kernel = kernel_of(modules[layer], layer)
        if kernel.stack or kernel.layout.entries:
            raise UserError(f"{folder}: {path} was trained, and a bank serves single matrices only")
        shape = kernel.layout.matrix
        change = after[path][...].astype(jnp.float32) - before[path][...].astype(jnp.float32)
        if name == "kernel":
            kernels[layer] = change.reshape(shape)
        else:
            biases[layer] = change.reshape(shape[1])
    return kernels, biases
