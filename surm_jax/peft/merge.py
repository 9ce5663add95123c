"""Folding updates into the kernels, for deployment."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.adapt import adapted_modules
from surm_jax.peft.kernels import matrix_view
from surm_jax.peft.lifecycle import adapter_names, checked_names
from surm_jax.peft.parts.attach import detach
from surm_jax.peft.parts.branch import Branch
from surm_jax.peft.parts.update import Delta


def merge(model: nnx.Module, names: Iterable[str] | None = None) -> tuple[nnx.Module, float]:
    """Returns a model whose kernels hold `W + alpha * dW`, summed in float32.

    `model` itself stays as it is, with all of its bits: to unmerge, go on with it. Merging a model without updates
    returns an equal model. A scale (`set_scale`) is merged too.

    >>> import surm_jax
    >>> model, _ = surm_jax.adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> merged, deviation = merge(model)
    >>> type(merged).__name__, deviation
    ('Linear', 0.0)

    Args:
        model: an adapted model.
        names: which adapters; all if `None`.

    Returns:
        The merged model, and the largest deviation of a merged entry from the exact sum (in float64): what rounding to
        the kernel's dtype cost. For a bfloat16 kernel this can exceed a small update.

    Raises:
        UserError: if a branch is among them, which no kernel can hold, or an adapter is not there, or an update is not
            finite, or another adapter's on the same layer is normalised (DoRA) and stays.
    """
    model = nnx.clone(model)
    names = adapter_names(model) if names is None else checked_names(model, names)
    parts = [row for row in adapted_modules(model) if row[1] in names]
    for path, name, part, _ in parts:
        if isinstance(part, Branch):
            raise UserError(
                f"{path} has a branch of the adapter {name!r}, which is not linear, so no kernel can hold it:"
                " deploy the base with the adapter's folder, where its matrices are stored fused"
            )
    touched = {path for path, *_ in parts}
    for path, name, part, _ in adapted_modules(model):
        if path in touched and name not in names and isinstance(part, Delta) and part.normalized:
            raise UserError(
                f"{path} has an update of the adapter {name!r} that is normalised (DoRA): it would take back what a"
                " merged one does to the norms. Merge both, or delete it first"
            )
    deviation = 0.0
    for path, rows in itertools.groupby(parts, key=lambda row: row[0]):
        rows = list(rows)
        layer = rows[0][3]
        kernel = layer.kernel[...]
        matrix = kernel.reshape(matrix_view(layer, path).shape)
        exact = _float64(matrix) + sum(_float64(delta.change(matrix)) for _, _, delta, _ in rows)
        if not np.isfinite(exact).all():
            raise UserError(f"{path} cannot be merged: its update or its kernel holds values that are not finite")
        merged = jnp.asarray(exact.astype(np.float32)).astype(kernel.dtype)
        deviation = max(deviation, float(np.max(np.abs(_float64(merged) - exact), initial=0.0)))
        # A variable of its own: other layers may share the one that it had, and a NumPy array is shared with `model`.
        layer.kernel = layer.kernel.copy(merged.reshape(kernel.shape))
        for _, name, _, _ in rows:
            detach(layer, name)
    return model, deviation


def _float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
