"""Several adapters on one base: which of them count, and how much.

All functions return another model and leave theirs as it is; arrays are shared, not copied. Scales are arrays, so a
compiled function that takes the model's state as an argument is not compiled again when adapters are switched, scaled,
or exchanged for others of the same shapes (`load_adapter` into `delete`, under the same name).
"""

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.peft.attach import detach
from surm_jax.peft.inject import adapted_modules


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
    if not isinstance(scale, jax.core.Tracer) and not math.isfinite(scale):
        raise UserError(f"the scale of the adapter {name!r} must be finite, got {scale}")
    model = nnx.clone(model)
    check_names(model, (name,))
    for _, owner, part, _ in adapted_modules(model):
        if owner == name:
            part.scale[...] = jnp.asarray(scale, jnp.float32)
    return model


def set_active(model: nnx.Module, names: Collection[str]) -> nnx.Module:
    """Returns the model with these adapters as they were trained and all others switched off.

    Without any name it computes what the base computes. Parameters that were trained besides, such as a head, are not
    an adapter's own, and stay.

    Raises:
      UserError: if the model has no adapter of one of these names.
    """
    if isinstance(names, str):
        raise UserError(f"names must be a list of adapters, got one string: write [{names!r}]")
    model, names = nnx.clone(model), tuple(names)
    check_names(model, names)
    for _, name, part, _ in adapted_modules(model):
        part.scale[...] = jnp.asarray(float(name in names), jnp.float32)
    return model


def delete(model: nnx.Module, name: str) -> nnx.Module:
    """Returns the model without an adapter. Parameters that were trained besides stay as they are.

    Raises:
      UserError: if the model has no adapter of this name.
    """
    model = nnx.clone(model)
    check_names(model, (name,))
    for _, owner, _, module in list(adapted_modules(model)):
        if owner == name:
            detach(module, name)
    return model


def check_names(model: nnx.Module, names: Collection[str]) -> None:
    """Checks that a model has adapters of these names.

    Raises:
      UserError: if it has not; the message says which there are.
    """
    known = adapter_names(model)
    for name in names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"the model has no adapter {name!r}{did_you_mean(name, known)} (there: {there})")
