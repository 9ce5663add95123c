"""Folding parts into the kernels, for deployment."""

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.kernels import kernel_matrix
from surm_jax.peft.lifecycle import adapter_names, checked_names, kernel_change
from surm_jax.peft.parts.base import KernelPart, iter_parts
from surm_jax.peft.parts.layers import detach


def merge(model: nnx.Module, adapters: Iterable[Adapter | str] | None = None) -> tuple[nnx.Module, float]:
    """Return a model whose kernels hold `W` plus what the parts of adapters add, summed in float64.

    `model` itself stays as it is, with all of its bits: to unmerge, continue with it. Merging a model without adapters
    returns an equal model. A scale (`set_scale`) is merged too.

    >>> import surm_jax
    >>> model, _ = surm_jax.adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> merged, deviation = merge(model)
    >>> type(merged).__name__, deviation
    ('Linear', 0.0)

    Args:
        model: An adapted model.
        adapters: The adapters, or their names; `None` means all.

    Returns:
        The merged model, and the largest deviation of a merged entry from the exact sum, in float64. The deviation is
        the cost of rounding to the kernel's dtype. For a bfloat16 kernel it can exceed a small update.

    Raises:
        UserError: If an adapter has a branch, which no kernel can hold, or is not in the model; if an update is not
            finite; or if another adapter, which stays, has a part on the same layer that depends on the kernel (DoRA).
    """
    model = nnx.clone(model)
    names = adapter_names(model) if adapters is None else checked_names(model, adapters)
    every = list(iter_parts(model))
    rows = [row for row in every if row.name in names]
    touched = {row.path for row in rows}
    for row in every:
        stays = row.path in touched and row.name not in names
        if stays and isinstance(row.part, KernelPart) and row.part.reads_kernel:
            raise UserError(
                f"{row.path} has a part of the adapter {row.name!r} that depends on the kernel, as a normalised one"
                " (DoRA) does: merging another adapter would change what it adds. Merge both, or delete it first"
            )
    deviation = 0.0
    for path, group in itertools.groupby(rows, key=lambda row: row.path):
        parts = list(group)
        layer: Any = parts[0].module
        changes = [_float64(kernel_change(row)) for row in parts]
        kernel = layer.kernel[...]
        exact = _float64(kernel_matrix(layer, path)) + sum(changes)
        if not np.isfinite(exact).all():
            raise UserError(f"{path} cannot be merged: its update or its kernel holds values that are not finite")
        merged = jnp.asarray(exact.astype(np.float32)).astype(kernel.dtype)
        deviation = max(deviation, float(np.max(np.abs(_float64(merged) - exact), initial=0.0)))
        # A variable of its own: other layers may share the one that it had, and a NumPy array is shared with `model`.
        layer.kernel = layer.kernel.copy(merged.reshape(kernel.shape))
        for row in parts:
            detach(layer, row.name)
    return model, deviation


def _float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
