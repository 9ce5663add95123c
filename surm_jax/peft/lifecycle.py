"""Several adapters on one base: which of them count, and how much.

All functions return another model and leave theirs as it is; arrays are shared, not copied. They take an `Adapter` or
its name. Scales are arrays. A compiled function that takes the model's state as an argument is therefore not compiled
again when adapters are switched, scaled, or exchanged for others of the same shapes (`delete`, then `load_adapter`
under the same name).
"""

import math
from collections.abc import Iterable
from numbers import Real

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import require_match
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter
from surm_jax.peft.kernels import kernel_matrix
from surm_jax.peft.parts.base import KERNEL, AttachedPart, iter_parts
from surm_jax.peft.parts.layers import detach


def adapter_names(model: nnx.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, sorted."""
    return tuple(sorted({row.name for row in iter_parts(model)}))


def set_scale(model: nnx.Module, adapter: Adapter | str, scale: float | Array) -> nnx.Module:
    """Return the model with `scale` times what an adapter adds: 0 switches it off, 1 is as it was trained.

    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> float(set_scale(model, adapter, 0.5).delta["default"].scale[...])
    0.5

    Raises:
        UserError: If the model does not have the adapter, or the scale is not a finite number.
    """
    if not isinstance(scale, jax.core.Tracer) and not (isinstance(scale, Real | jax.Array) and math.isfinite(scale)):
        raise UserError(f"the scale of an adapter must be a finite number, got {scale!r}")
    model = nnx.clone(model)
    names = checked_names(model, [adapter])
    for row in iter_parts(model):
        if row.name in names:
            row.part.scale.set_value(jnp.asarray(scale, jnp.float32))
    return model


def set_active(model: nnx.Module, adapters: Iterable[Adapter | str]) -> nnx.Module:
    """Return the model with these adapters as they were trained, and all others switched off.

    With no adapter it computes what the base computes. Other parameters that were trained, such as a head, belong to no
    adapter and stay.

    Raises:
        UserError: If the model does not have one of the adapters.
    """
    model = nnx.clone(model)
    names = checked_names(model, adapters)
    for row in iter_parts(model):
        row.part.scale.set_value(jnp.asarray(float(row.name in names), jnp.float32))
    return model


def delete(model: nnx.Module, adapter: Adapter | str) -> nnx.Module:
    """Return the model without an adapter. Other parameters that were trained with it stay as they are.

    Raises:
        UserError: If the model does not have the adapter.
    """
    model = nnx.clone(model)
    names = checked_names(model, [adapter])
    for row in list(iter_parts(model)):
        if row.name in names:
            detach(row.module, row.name)
    return model


def checked_names(model: nnx.Module, adapters: Iterable[Adapter | str]) -> tuple[str, ...]:
    """Return the names of adapters, all of which the model has.

    Raises:
        UserError: If it lacks one; the message lists those of the model.
    """
    if isinstance(adapters, str | Adapter):
        one = repr(adapters) if isinstance(adapters, str) else "adapter"
        raise UserError(f"adapters must be a list, got one adapter: write [{one}]")
    if not isinstance(adapters, Iterable):
        raise UserError(f"adapters must be a list, such as [{DEFAULT_NAME!r}], got {adapters!r:.80}")
    known, names = adapter_names(model), []
    for adapter in adapters:
        name = adapter.name if isinstance(adapter, Adapter) else adapter
        if not isinstance(name, str):
            raise UserError(
                f"an adapter is given as an Adapter or by its name, such as {DEFAULT_NAME!r}, got {name!r:.80}"
            )
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"the model has no adapter {name!r}{did_you_mean(name, known)} (there: {there})")
        names.append(name)
    return tuple(names)


def parts_of(model: nnx.Module, adapter: Adapter) -> list[AttachedPart]:
    """Return the parts of one adapter in a model, sorted by path; none for an adapter without rules.

    Raises:
        UserError: If the model does not have the adapter, or has no part of one of its rules.
    """
    if not isinstance(adapter, Adapter):
        raise UserError(
            f"adapter must be what `adapt` or `load_adapter` returned beside the model, got {adapter!r:.80}"
        )
    targets = [rule.target for rule in adapter.rules if rule.method]
    checked_names(model, [adapter] if targets else [])
    rows = [row for row in iter_parts(model) if row.name == adapter.name]
    for target in targets:
        require_match(target, [row.path for row in rows], f"module with the adapter {adapter.name!r}")
    return rows


def kernel_change(row: AttachedPart) -> Float[Array, "in out"]:
    """Return what a part adds to the kernel of its layer, scale included, as a dense float32 matrix.

    Raises:
        UserError: If no kernel can hold what the part does.
    """
    # A part of the other slot does not look at a kernel, and its module may have none.
    kernel = kernel_matrix(row.module, row.path) if row.part.slot == KERNEL else jnp.zeros((0, 0))
    try:
        return row.part.change(kernel)
    except UserError as error:
        raise UserError(f"{row.path or 'the model'} has a part of the adapter {row.name!r} that {error}") from None
