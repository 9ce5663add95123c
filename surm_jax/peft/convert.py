"""Converting an adapter to another method, and combining several adapters, by nearest matrices.

An update of any kind can be converted to LoRA, for a server that loads only LoRA adapters. The functions return the
approximation errors: check them. A circulant of full rank, for example, has a flat spectrum, and an approximation of
low rank loses much of it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.adapt import make_part, matched_modules
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.lifecycle import delete, kernel_change, parts_of
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.parts.base import KERNEL
from surm_jax.peft.parts.layers import attach


def convert(
    model: nnx.Module, adapter: Adapter, method: PartMethod, *, name: str = "converted"
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Return the model with an adapter replaced by its nearest approximation in another method.

    >>> import jax.numpy as jnp
    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.CirculantUpdate())], rngs=nnx.Rngs(1)
    ... )
    >>> model.delta["default"].r1[...] = jnp.arange(4.0)
    >>> _, _, errors = convert(model, adapter, surm_jax.LoRA(rank=4))
    >>> errors[""] < 1e-5
    True

    Args:
        model: A model with the adapter. The adapter's scale is included in what is converted.
        adapter: The adapter.
        method: The method of the new parts. A learned alpha is set to 1.
        name: The name of the new adapter, which replaces the old one.

    Returns:
        The new model, the new adapter, and the relative error in the Frobenius norm of each part, by the layer's path.

    Raises:
        UserError: If the adapter has a part that cannot be written as a change of a kernel, such as a branch; if an
            update is not finite; if the method cannot be fitted to a given matrix; or if it does not fit a layer.
    """
    if not isinstance(method, PartMethod) or method.part.slot != KERNEL:
        raise UserError(f"an adapter is converted to an update such as LoRA(rank=4), not to {method!r}")
    targets = _changes(model, adapter)
    rules = tuple(dataclasses.replace(rule, method=method if rule.method else None) for rule in adapter.rules)
    converted = Adapter(rules, adapter.train, name)
    return _with_nearest(delete(model, adapter.name), converted, targets)


def combine(
    model: nnx.Module, weights: Mapping[Adapter, float], *, name: str = "combined"
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Return the model with one more adapter: the weighted sum of the updates of adapters with the same rules.

    The sum is exact for families that are closed under addition, such as circulants in their stored form. For other
    families, the new update is the matrix of the family that is nearest to the sum.

    Args:
        model: A model with all of the adapters. Their scales are included in what is combined. Other trained
            parameters, such as the head, are not combined: they stay as they are in the model.
        weights: A weight for each adapter. The weights need not sum to 1.
        name: The name of the new adapter. The old adapters stay in the model; switch them off with `set_active`.

    Returns:
        The new model, the new adapter, and the relative error in the Frobenius norm of each part, by the layer's path.

    Raises:
        UserError: If the adapters have different rules, or an adapter cannot be converted (see `convert`).
    """
    if not weights or not isinstance(weights, Mapping):
        raise UserError(f"combine needs a weight for every adapter, {{adapter: 0.5, ...}}, got {weights!r}")
    for adapter in weights:
        parts_of(model, adapter)  # Raises a `UserError` if the model does not have the adapter.
    first, *others = weights
    for other in others:
        if other.rules != first.rules:
            raise UserError(
                f"the adapters {first.name!r} and {other.name!r} have different rules: convert one of them first"
            )
    total: dict[str, np.ndarray] = {}
    for adapter, weight in weights.items():
        for path, change in _changes(model, adapter).items():
            total[path] = total.get(path, 0) + weight * change
    return _with_nearest(model, Adapter(first.rules, (), name), total)


def _changes(model: nnx.Module, adapter: Adapter) -> dict[str, np.ndarray]:
    """Return the changes that an adapter makes to kernels, as dense matrices by the layer's path."""
    changes = {row.path: np.asarray(kernel_change(row)) for row in parts_of(model, adapter)}
    if not changes:
        raise UserError(f"the adapter {adapter.name!r} has no update, and only updates can be converted or combined")
    return changes


def _with_nearest(
    model: nnx.Module, adapter: Adapter, targets: Mapping[str, np.ndarray]
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Return the model with an adapter whose parts approximate dense targets, the adapter, and the relative errors."""
    model = nnx.clone(model)
    errors = {}
    for matched in matched_modules(model, adapter):
        path, target = matched.path, targets[matched.path]
        if not np.isfinite(target).all():
            raise UserError(f"{path or 'the model'} cannot be converted: its update holds values that are not finite")
        try:
            part = make_part(matched, "auto", jax.random.key(0))
            change = part.fit(target)
        except UserError as error:
            raise UserError(f"{path or 'the model'} cannot become {matched.method.name}: {error}") from None
        errors[path] = float(np.linalg.norm(change - target) / max(np.linalg.norm(target), np.finfo(np.float32).tiny))
        attach(matched.module, adapter.name, part)
    return model, adapter, errors
