"""Add an adapter to a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import join, require_match
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter, Rule
from surm_jax.peft.check import check
from surm_jax.peft.fingerprint import checksums
from surm_jax.peft.kernels.widths import module_stack, output_width
from surm_jax.peft.matched import MatchedModule, matched_modules, presets_of
from surm_jax.peft.owners import claim
from surm_jax.peft.parts.base import KERNEL, AdapterParam, Part, Place, is_abstract
from surm_jax.peft.parts.layers import attach
from surm_jax.peft.parts.stacks import stacked


def adapt(
    model: nnx.Module,
    rules: Sequence[Rule],
    *,
    train: Sequence[str] = (),
    name: str = DEFAULT_NAME,
    execution: str = "auto",
    example: Any = None,
    rngs: nnx.Rngs,
) -> tuple[nnx.Module, Adapter]:
    """Return a copy of a model with a new adapter, which at first changes nothing.

    `model` is not changed, and shares its arrays with the copy. It may already have adapters with other names. What all
    of them add to the output of a layer is summed.

    In this example, the layer `query` gets a circulant update, which trains two vectors of 8 entries, and `head` is
    trained itself:

    >>> import surm_jax
    >>> model = nnx.Dict(query=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), head=nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    >>> adapted, adapter = adapt(
    ...     model, [Rule("query", surm_jax.CirculantUpdate())], train=["head/.*"], rngs=nnx.Rngs(2)
    ... )
    >>> adapted.query.delta["default"].r1.shape
    (8,)

    Args:
        model: Any NNX model; it may be abstract (`nnx.eval_shape`). Its class may have a dictionary `adapter_targets`
            that maps names to regular expressions for module paths. A rule may use such a name as its target.
        rules: Each rule assigns a method to the modules that match its target. If several rules match a module, the
            first one applies.
        train: Regular expressions for the paths of parameters of the base model that are also trained, such as
            `head/.*`.
        name: The name that the adapter gets in the model.
        execution: How structured updates are computed: `auto`, `fft`, `dense` or `fused`. All give the same result up
            to rounding (`surm_jax.structured.products.execution`).
        example: An input of the model, or a tuple of positional arguments, which may be abstract. If it is given, the
            adapted model is checked with it: every update must reach the output, and no adapted kernel may have a
            second reader (`check`).
        rngs: The random number generators. The initial values are drawn from the stream `params`.

    Returns:
        The adapted model and the adapter. The NNX filter `adapter.trainable` selects the trained parameters.

    Raises:
        UserError: If a rule or a pattern matches nothing, if a rule matches a module that cannot be adapted, if the
            model already has an adapter of this name, or if another adapter of it trains a parameter in `train`.
    """
    if isinstance(rules, Rule):
        raise UserError("rules must be a list of rules, got one: write [Rule(...)]")
    if wrong := [rule for rule in rules if not isinstance(rule, Rule)]:
        raise UserError(f"rules must be a list of rules, such as [Rule('.*/query', LoRA())], got {wrong[0]!r} in it")
    if not isinstance(rngs, nnx.Rngs):
        raise UserError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
    if isinstance(train, str):
        raise UserError(f"train must be a list of patterns, got one string: write [{train!r}]")
    model, presets = nnx.clone(model), presets_of(model)
    with_presets = tuple(dataclasses.replace(rule, target=presets.get(rule.target, rule.target)) for rule in rules)
    adapter = Adapter(with_presets, tuple(train), name)
    for matched in matched_modules(model, adapter):
        try:
            attach(matched.module, name, make_part(matched, execution, rngs.params()))
        except UserError as error:
            raise UserError(f"{matched.path or 'the model'} cannot be adapted: {error}") from None
    claim_trained(model, adapter)
    if example is not None:
        check(model, adapter, example)
    return model, dataclasses.replace(adapter, base=checksums(model, adapter))


def claim_trained(model: nnx.Module, adapter: Adapter) -> dict[str, nnx.Param]:
    """Mark the parameters of the base model that an adapter trains as owned by it, in place.

    An owned parameter cannot be trained by a second adapter.

    Returns:
        A dictionary from path to variable for these parameters.

    Raises:
        UserError: If a pattern of the adapter matches no parameter, or if another adapter trains one of them.
    """
    base = base_parameters(model)
    paths = dict.fromkeys(path for pattern in adapter.train for path in require_match(pattern, list(base), "parameter"))
    for path in paths:
        if not jnp.issubdtype(base[path].dtype, jnp.inexact):
            raise UserError(f"{path} cannot be trained: it holds {base[path].dtype} numbers. Leave it out of `train`")
    claim(base, paths, adapter.name)
    return {path: base[path] for path in paths}


def make_part(matched: MatchedModule, execution: str, key: jax.Array) -> Part:
    """Make the part that the method of a rule adds to a module, with its initial values.

    The result is a stack of parts with different random numbers if the module is a stack of layers, or if its kernel
    holds several matrices. It is abstract if the module is (`nnx.eval_shape`).

    Raises:
        UserError: If the method does not fit the module. The message does not name the module; callers add its path.
    """
    path, module, rule, method, parameter = matched
    if method.part.slot == KERNEL:
        kernel = matched.kernel.matrices()
        width, stack = kernel.shape[-1], kernel.shape[:-2]
    else:
        kernel, width, stack = None, output_width(module, path), module_stack(module, path)

    def make(key: jax.Array, kernel: jax.Array | None) -> Part:
        part = method.make_part(Place(width, kernel, rule.parts, rule.which, execution), key)
        part.parameter, part.axes = parameter, rule.axes
        return part

    def make_all(key: jax.Array, kernel: jax.Array | None) -> Part:
        return stacked(make, stack, jax.random.split(key, stack) if stack else key, kernel)

    return nnx.eval_shape(make_all, key, kernel) if is_abstract(module) else make_all(key, kernel)


def base_parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """Return the `nnx.Param`s of a model by path, without those of its adapters."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {join(path): variable for path, variable in parameters if not isinstance(variable, AdapterParam)}
