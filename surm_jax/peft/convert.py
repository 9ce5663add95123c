"""Convert an adapter to another method, or combine several adapters into one.

Both functions compute the dense change of each kernel, and approximate it by the nearest matrix that the new method can
represent. An update of any kind can be converted to LoRA, for example, for a server that loads only LoRA adapters.

Check the errors that both functions return. The singular values of a circulant, for example, may all have similar
sizes, and then an approximation of low rank loses much.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.adapt import make_part
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.fingerprint import base_variables, checksums
from surm_jax.peft.lifecycle import kernel_change, parts_of, remove
from surm_jax.peft.matched import matched_modules
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.owners import claim, owners
from surm_jax.peft.parts.base import KERNEL
from surm_jax.peft.parts.layers import attach
from surm_jax.peft.parts.stacks import fitted


def convert(
    model: nnx.Module, adapter: Adapter, method: PartMethod, *, name: str = "converted"
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Return the model with an adapter replaced by its nearest approximation in another method.

    In this example, LoRA of rank 4 can represent any 4 x 4 matrix, so that only rounding errors are left. The path of
    the layer is empty, because the layer is the model itself:

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
        model: A model that has the adapter. The converted matrices include the adapter's scale (`set_scale`).
        adapter: The adapter.
        method: The method of the new adapter. If it trains alpha, alpha is set to 1.
        name: The name of the new adapter, which replaces the old one.

    Returns:
        The new model, the new adapter, and a dictionary from the path of each layer to the relative error of its new
        update in the Frobenius norm.

    Raises:
        UserError: If the adapter has a part that cannot be written as a change of a kernel, such as a branch; if an
            update is not finite; if the method, such as DoRA, has no way to approximate a given matrix; or if its
            settings do not fit a layer.
    """
    if not isinstance(method, PartMethod) or method.part.slot != KERNEL:
        raise UserError(f"an adapter is converted to an update such as LoRA(rank=4), not to {method!r}")
    targets = _changes(model, adapter)
    rules = tuple(dataclasses.replace(rule, method=method if rule.method else None) for rule in adapter.rules)
    converted = dataclasses.replace(adapter, rules=rules, name=name)
    owned = [path for path, owner in owners(model).items() if owner == adapter.name]
    model = nnx.clone(model)
    remove(model, adapter.name)
    model, converted, errors = _with_nearest(model, converted, targets)
    claim(base_variables(model), owned, name)
    return model, converted, errors


def combine(
    model: nnx.Module, weights: Mapping[Adapter, float], *, name: str = "combined"
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Return the model with a new adapter that is the weighted sum of several adapters with the same rules.

    The sum is exact for families that are closed under addition, such as circulants that are stored as one vector. For
    other families, each new update is the matrix of the family that is nearest to the sum.

    Args:
        model: A model that has all of the adapters. The summed updates include the scales of the adapters. Other
            trained parameters, such as the head, are not combined: they stay as they are in the model.
        weights: A dictionary from each adapter to its weight. The weights need not sum to 1.
        name: The name of the new adapter. The old adapters stay in the model; switch them off with `set_active`.

    Returns:
        The new model, the new adapter, and a dictionary from the path of each layer to the relative error of its new
        update in the Frobenius norm.

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
    combined = Adapter(first.rules, (), name)
    return _with_nearest(model, dataclasses.replace(combined, base=checksums(model, combined)), total)


def _changes(model: nnx.Module, adapter: Adapter) -> dict[str, np.ndarray]:
    """Return the dense change of the kernel of each adapted layer, by the path of the layer."""
    changes = {row.path: np.asarray(kernel_change(row)) for row in parts_of(model, adapter)}
    if not changes:
        raise UserError(f"the adapter {adapter.name!r} has no update, and only updates can be converted or combined")
    return changes


def _with_nearest(
    model: nnx.Module, adapter: Adapter, targets: Mapping[str, np.ndarray]
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Return a copy of the model with a new adapter that approximates given changes of kernels.

    Args:
        model: The model.
        adapter: The recipe of the new adapter.
        targets: The dense change of each layer's kernel, by the path of the layer.

    Returns:
        The new model, the adapter, and a dictionary from the path of each layer to the relative error of its update in
        the Frobenius norm.
    """
    model = nnx.clone(model)
    errors = {}
    for matched in matched_modules(model, adapter):
        path, target = matched.path, targets[matched.path]
        if not np.isfinite(target).all():
            raise UserError(f"{path or 'the model'} cannot be converted: its update holds values that are not finite")
        try:
            part, change = fitted(make_part(matched, "auto", jax.random.key(0)), target)
        except UserError as error:
            raise UserError(f"{path or 'the model'} cannot become {matched.method.name}: {error}") from None
        errors[path] = float(np.linalg.norm(change - target) / max(np.linalg.norm(target), np.finfo(np.float32).tiny))
        attach(matched.module, adapter.name, part)
    return model, adapter, errors
