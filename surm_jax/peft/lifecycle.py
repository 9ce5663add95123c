"""Several adapters on one base: which of them count, and how much.

All functions return another model and leave theirs as it is; arrays are shared, not copied. Scales are arrays, so a
compiled function that takes the model's state as an argument is not compiled again when adapters are switched, scaled,
or exchanged for others of the same shapes (`load_adapter` into `delete`, under the same name).
"""

import math
from collections.abc import Iterable
from numbers import Real

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import require_match
from surm_jax.peft.adapt import adapted_modules
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter
from surm_jax.peft.parts.attach import detach
from surm_jax.peft.parts.branch import Branch
from surm_jax.peft.parts.update import Delta


def adapter_names(model: nnx.Module) -> tuple[str, ...]:
    """Returns the names of a model's adapters, sorted."""
    return tuple(sorted({name for _, name, *_ in adapted_modules(model)}))


def set_scale(model: nnx.Module, name: str, scale: float) -> nnx.Module:
    """Returns the model with `scale` times what an adapter adds: 0 switches it off, 1 is as it was trained.

    >>> import surm_jax
    >>> model, _ = surm_jax.adapt(
    ...     nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> float(set_scale(model, "default", 0.5).delta["default"].scale[...])
    0.5

    Raises:
        UserError: if the model has no adapter of this name.
    """
    if not isinstance(scale, jax.core.Tracer) and not (isinstance(scale, Real | jax.Array) and math.isfinite(scale)):
        raise UserError(f"the scale of the adapter {name!r} must be a finite number, got {scale!r}")
    model = nnx.clone(model)
    checked_names(model, (name,))
    for _, owner, part, _ in adapted_modules(model):
        if owner == name:
            part.scale.set_value(jnp.asarray(scale, jnp.float32))
    return model


def set_active(model: nnx.Module, names: Iterable[str]) -> nnx.Module:
    """Returns the model with these adapters as they were trained and all others switched off.

    Without any name it computes what the base computes. Parameters that were trained besides, such as a head, are not
    an adapter's own, and stay.

    Raises:
        UserError: if the model has no adapter of one of these names.
    """
    model, names = nnx.clone(model), checked_names(model, names)
    for _, name, part, _ in adapted_modules(model):
        part.scale.set_value(jnp.asarray(float(name in names), jnp.float32))
    return model


def delete(model: nnx.Module, name: str) -> nnx.Module:
    """Returns the model without an adapter. Parameters that were trained besides stay as they are.

    Raises:
        UserError: if the model has no adapter of this name.
    """
    model = nnx.clone(model)
    checked_names(model, (name,))
    for _, owner, _, module in list(adapted_modules(model)):
        if owner == name:
            detach(module, name)
    return model


def checked_names(model: nnx.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names, of adapters that a model has.

    Raises:
        UserError: if it has not; the message says which there are.
    """
    if isinstance(names, str):
        raise UserError(f"names must be a list of adapters, got one string: write [{names!r}]")
    if not isinstance(names, Iterable):
        raise UserError(f"names must be a list of adapters, such as [{DEFAULT_NAME!r}], got {names!r:.80}")
    known, names = adapter_names(model), tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"adapters are called by their names, such as {DEFAULT_NAME!r}, got {name!r:.80}")
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"the model has no adapter {name!r}{did_you_mean(name, known)} (there: {there})")
    return names


def parts_of(model: nnx.Module, adapter: Adapter) -> list[tuple[str, str, Delta | Branch, nnx.Module]]:
    """Returns the rows of `adapted_modules` of one adapter; none for one without rules.

    Raises:
        UserError: if the model has not the adapter, or one of its rules has nothing in it.
    """
    if not isinstance(adapter, Adapter):
        raise UserError(
            f"adapter must be what `adapt` or `load_adapter` returned beside the model, got {adapter!r:.80}"
        )
    targets = [rule.target for rule in adapter.rules if rule.method]
    checked_names(model, [adapter.name] if targets else [])
    rows = [row for row in adapted_modules(model) if row[1] == adapter.name]
    for target in targets:
        require_match(target, [path for path, *_ in rows], f"module with the adapter {adapter.name!r}")
    return rows
