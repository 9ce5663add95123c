"""Several adapters on one base model: switch them on and off, scale them, and delete them.

The functions that change something return a new model, which shares its arrays with the given one. Callers pass an
`Adapter` or its name.

Scales are arrays, so switching or scaling an adapter does not compile a function again that takes the model's state as
an argument. Nor does replacing an adapter by one with the same shapes: `delete`, then `load_adapter` under the same
name.
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
from surm_jax.peft.kernels import Kernel
from surm_jax.peft.kernels.parameter import parameter_kernel
from surm_jax.peft.owners import adapter_names, owners, release
from surm_jax.peft.parts.base import KERNEL, AttachedPart, iter_parts
from surm_jax.peft.parts.layers import detach
from surm_jax.peft.parts.stacks import scaled


def set_scale(model: nnx.Module, adapter: Adapter | str, scale: float | Array) -> nnx.Module:
    """Return the model with a new scale for an adapter, which multiplies everything that the adapter adds.

    The scale 1 gives the adapter as it was trained, and 0 switches it off. The new scale replaces an earlier one. It is
    stored in every part of the adapter. The adapter in this example has one part:

    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> float(set_scale(model, adapter, 0.5).delta["default"].scale[...])
    0.5

    Raises:
        UserError: If the model does not have the adapter, if the adapter has no part, or if the scale is not a finite
            number.
    """
    if not isinstance(scale, jax.core.Tracer) and not (isinstance(scale, Real | jax.Array) and math.isfinite(scale)):
        raise UserError(f"the scale of an adapter must be a finite number, got {scale!r}")
    model = nnx.clone(model)
    (name,) = checked_names(model, [adapter])
    parts = [row.part for row in iter_parts(model) if row.name == name]
    if not parts:
        raise UserError(f"the adapter {name!r} has no part that could be scaled")
    for part in parts:
        scaled(part, scale)
    return model


def set_active(model: nnx.Module, adapters: Iterable[Adapter | str]) -> nnx.Module:
    """Return the model with the given adapters at scale 1, and all other adapters at scale 0.

    With an empty list, all adapters are off, and the model computes what the base model computes.

    Raises:
        UserError: If the model does not have one of the adapters, or if an adapter that would be off also trained
            parameters of the base model, such as a head. Their earlier values are no longer known.
    """
    model = nnx.clone(model)
    names = checked_names(model, adapters)
    for path, owner in owners(model).items():
        if owner not in names:
            raise UserError(
                f"the adapter {owner!r} cannot be switched off: it also trained {path}, and the model does not have the"
                " value from before. Use the base model, and load every other adapter on it"
            )
    for row in iter_parts(model):
        scaled(row.part, float(row.name in names))
    return model


def delete(model: nnx.Module, adapter: Adapter | str) -> nnx.Module:
    """Return the model without an adapter. Other parameters that were trained with the adapter keep their values.

    Raises:
        UserError: If the model does not have the adapter, or if the adapter also trained parameters of the base model
            and other adapters would stay, which were not trained with these parameters.
    """
    model = nnx.clone(model)
    (name,) = checked_names(model, [adapter])
    path = next((path for path, owner in owners(model).items() if owner == name), None)
    if path and (others := [other for other in adapter_names(model) if other != name]):
        raise UserError(
            f"the adapter {name!r} cannot be deleted beside {', '.join(others)}: it also trained {path}, and the model"
            " does not have the value from before. Use the base model, and load every other adapter on it"
        )
    remove(model, name)
    return model


def remove(model: nnx.Module, name: str) -> None:
    """Remove the parts of an adapter from a model, in place. Parameters of the base model keep their trained values."""
    for row in list(iter_parts(model)):
        if row.name == name:
            detach(row.module, name)
    release(model, [name])


def checked_names(model: nnx.Module, adapters: Iterable[Adapter | str]) -> tuple[str, ...]:
    """Check that the model has the given adapters, and return their names.

    Raises:
        UserError: If the model lacks one of them. The message lists the adapters of the model.
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
            raise UserError(f"the model has no adapter {name!r}{did_you_mean(name, known)} (known: {there})")
        names.append(name)
    return tuple(names)


def parts_of(model: nnx.Module, adapter: Adapter) -> list[AttachedPart]:
    """Return what one adapter has added to a model, as `AttachedPart`s sorted by path.

    An adapter without rules has no parts.

    Raises:
        UserError: If the model does not have the adapter, or if the model has no part for one of the adapter's rules.
    """
    if not isinstance(adapter, Adapter):
        raise UserError(
            f"adapter must be the Adapter that `adapt` or `load_adapter` returned with the model, got {adapter!r:.80}"
        )
    targets = [rule.target for rule in adapter.rules if rule.method]
    checked_names(model, [adapter] if targets else [])
    rows = [row for row in iter_parts(model) if row.name == adapter.name]
    for target in targets:
        require_match(target, [row.path for row in rows], f"module with the adapter {adapter.name!r}")
    return rows


def kernel_at(row: AttachedPart) -> Kernel:
    """Return the kernel that a part changes."""
    return parameter_kernel(row.module, row.path, row.part.parameter, row.part.axes)


def kernel_change(row: AttachedPart) -> Float[Array, "*stack in out"]:
    """Return the change of a layer's kernel that would have the same effect as a part of an adapter.

    The change is a dense float32 matrix, multiplied by the scale of the part. For a stack of parts, it is a stack of
    matrices.

    Raises:
        UserError: If no change of the kernel has the same effect as the part, which may be a branch, for example.
    """
    # An output part does not use a kernel, and its module may have none.
    kernel = kernel_at(row).matrices() if row.part.slot == KERNEL else jnp.zeros((0, 0))
    try:
        return row.part.change(kernel)
    except UserError as error:
        raise UserError(f"{row.path or 'the model'} has a part of the adapter {row.name!r} that {error}") from None
