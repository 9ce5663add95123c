"""Merge adapters into the kernels of a model, for deployment."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.check import check_merged
from surm_jax.peft.kernels.base import own_functions
from surm_jax.peft.lifecycle import checked_names, kernel_at, kernel_change
from surm_jax.peft.owners import adapter_names, owners, release
from surm_jax.peft.parts.base import KERNEL, AttachedPart, KernelPart, iter_parts
from surm_jax.peft.parts.layers import detach


def merge(
    model: nnx.Module, adapters: Iterable[Adapter | str] | None = None, *, example: Any = None
) -> tuple[nnx.Module, float]:
    """Return a copy of a model with the updates of adapters added to the kernels, and without these adapters.

    The sums are computed in float64, and include the scales of the adapters (`set_scale`). `model` is not changed: to
    undo the merge, continue with `model`. Merging a model without adapters returns an equal model.

    In this example, the layer gets back its original class. The deviation is 0, since a new LoRA update equals zero:

    >>> import surm_jax
    >>> model, _ = surm_jax.adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> merged, deviation = merge(model)
    >>> type(merged).__name__, deviation
    ('Linear', 0.0)

    Args:
        model: An adapted model.
        adapters: The adapters to merge, or their names. `None` means all.
        example: An input of the model, or a tuple of positional arguments. If it is given, the outputs of the merged
            and of the adapted model are compared. This finds kernels that the model also reads in another place.

    Returns:
        The merged model, and the largest absolute difference between a merged kernel entry and the exact sum. The
        difference comes from rounding to the kernel's dtype. For a bfloat16 kernel it can exceed a small update.

    Raises:
        UserError: If the model does not have an adapter; if an adapter has a branch, which cannot be merged into a
            kernel; if an update or a kernel is not finite; or if an adapter that stays in the model trained a kernel
            that the merge changes, or depends on it as a DoRA adapter does; if a layer multiplies by a function of its
            own (such as `dot_general`) and no example is given; or if the outputs for `example` differ.
    """
    adapted, model = model, nnx.clone(model)
    names = adapter_names(model) if adapters is None else checked_names(model, adapters)
    every = list(iter_parts(model))
    rows = [row for row in every if row.name in names]
    touched = {row.path for row in rows}
    for row in every:
        stays = row.path in touched and row.name not in names
        if stays and isinstance(row.part, KernelPart) and row.part.reads_kernel:
            raise UserError(
                f"{row.path} has a part of the adapter {row.name!r} that depends on the kernel (such as DoRA):"
                " merging another adapter would change what this part adds. Merge both adapters, or delete this one"
            )
    kernels = {path for row in rows if row.part.slot == KERNEL for path in _kernel_paths(row)}
    for path, owner in owners(model).items():
        if owner not in names and path in kernels:
            raise UserError(
                f"{path} was trained by the adapter {owner!r}, and merging another adapter would change it: merge both"
            )
    deviation = 0.0
    for path, group in itertools.groupby(rows, key=lambda row: row.path):
        parts = list(group)
        changes = [_float64(kernel_change(row)) for row in parts]
        kernel = kernel_at(parts[0])
        if kernel.quantised:
            raise UserError(
                f"{path} cannot be merged: its kernel is quantised, and would round the update away. Serve the adapter"
                " beside the quantised kernel, or merge it into the model before quantisation and quantise the result"
            )
        if example is None and (own := own_functions(kernel.module)):
            raise UserError(
                f"{path or 'the model'} has its own {own[0]}, for which the product with the sum of kernel and update"
                " may differ from the sum of the products: give merge an example of the inputs, to compare the outputs"
            )
        exact = _float64(kernel.matrices()) + sum(changes)
        if not np.isfinite(exact).all():
            raise UserError(f"{path} cannot be merged: its update or its kernel holds values that are not finite")
        merged = jnp.asarray(exact.astype(np.float32)).astype(kernel.variable.dtype)
        deviation = max(deviation, float(np.max(np.abs(_float64(merged) - exact), initial=0.0)))
        kernel.replace(merged)
        for row in parts:
            detach(row.module, row.name)
    release(model, names)
    if example is not None:
        check_merged(adapted, model, example)
    return model, deviation


def _kernel_paths(row: AttachedPart) -> tuple[str, ...]:
    """Return the path of the parameter that a part changes. The path of the part may be that of its module."""
    return (row.path, f"{row.path}/{kernel_at(row).parameter}".removeprefix("/"))


def _float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
