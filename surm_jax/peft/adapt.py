"""Add an adapter to a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import join, matching, no_match_message, require_match
from surm_jax.peft.adapter import DEFAULT_NAME, Adapter, Rule
from surm_jax.peft.fingerprint import checksums
from surm_jax.peft.kernels import Kernel, check_product, check_slots, kernel_of, kind_of
from surm_jax.peft.kernels.parameter import ParameterKind, check_parameter, parameter_kernel
from surm_jax.peft.kernels.widths import module_stack, output_width
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.owners import adapter_names, claim
from surm_jax.peft.parts.base import KERNEL, SLOTS, AdapterParam, Part, Place, is_abstract, is_adapted
from surm_jax.peft.parts.layers import attach
from surm_jax.peft.parts.stacks import stacked


def adapt(
    model: nnx.Module,
    rules: Sequence[Rule],
    *,
    train: Sequence[str] = (),
    name: str = DEFAULT_NAME,
    execution: str = "auto",
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
    model, presets = nnx.clone(model), _presets(model)
    with_presets = tuple(dataclasses.replace(rule, target=presets.get(rule.target, rule.target)) for rule in rules)
    adapter = Adapter(with_presets, tuple(train), name)
    for matched in matched_modules(model, adapter):
        try:
            attach(matched.module, name, make_part(matched, execution, rngs.params()))
        except UserError as error:
            raise UserError(f"{matched.path or 'the model'} cannot be adapted: {error}") from None
    claim_trained(model, adapter)
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
    claim(base, paths, adapter.name)
    return {path: base[path] for path in paths}


class MatchedModule(NamedTuple):
    """A module that an adapter changes, and the rule that applies to it.

    Attributes:
        path: The path of the module in the model.
        module: The module.
        rule: The rule.
        method: The rule's method, which makes the part that the adapter adds to the module.
    """

    path: str
    module: nnx.Module
    rule: Rule
    method: PartMethod
    parameter: str = ""

    @property
    def kernel(self) -> Kernel:
        """The kernel that the part changes."""
        if self.parameter:
            return parameter_kernel(self.module, self.path, self.parameter, self.rule.axes)
        return kernel_of(self.module, self.path)


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
        if parameter:
            part.parameter, part.axes = parameter, rule.axes
        return part

    def make_all(key: jax.Array, kernel: jax.Array | None) -> Part:
        return stacked(make, stack, jax.random.split(key, stack) if stack else key, kernel)

    return nnx.eval_shape(make_all, key, kernel) if is_abstract(module) else make_all(key, kernel)


def base_parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """Return the `nnx.Param`s of a model by path, without those of its adapters."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {join(path): variable for path, variable in parameters if not isinstance(variable, AdapterParam)}


def matched_modules(model: nnx.Module, adapter: Adapter) -> list[MatchedModule]:
    """Return the modules that an adapter's rules select, with the rule for each, sorted by path.

    Raises:
        UserError: If a rule matches no module; if earlier rules already match all of its modules; if the method of a
            rule chooses none of the matched modules; if a matched module cannot be adapted; or if the model already has
            an adapter of this name.
    """
    if adapter.name in adapter_names(model):
        raise UserError(
            f"the model has an adapter called {adapter.name!r} already: merge or delete it, or choose another name"
        )
    modules = _own_modules(model)
    kernels = sorted(path for path, module in modules.items() if kind_of(module))
    callable_ = sorted(path for path, module in modules.items() if callable(module))
    parameters = _own_parameters(modules)
    chosen: dict[str, Rule] = {}
    for rule in adapter.rules:
        in_kernel = rule.method is not None and rule.method.part.slot == KERNEL
        candidates = kernels if in_kernel else callable_
        found = matching(rule.target, candidates)
        if in_kernel and not found:
            found = matching(rule.target, list(parameters))
        if not found:
            near = did_you_mean(rule.target, _presets(model))
            what = "layer with a kernel" if in_kernel else "module"
            raise UserError(_nothing_to_adapt(rule.target, candidates, modules, what) + near)
        if rule.method:
            try:
                found = rule.method.choose(found)
            except UserError as error:
                raise UserError(f"the rule {rule.target!r} adapts nothing: {error}") from None
        new = [path for path in found if path not in chosen]
        if not new:
            raise UserError(f"the rule {rule.target!r} has no effect: earlier rules match all of its modules")
        chosen.update(dict.fromkeys(new, rule))
    rows = []
    for path, rule in chosen.items():
        if rule.method:
            module, parameter = (modules[path], "") if path in modules else parameters[path]
            rows.append(MatchedModule(path, module, rule, rule.method, parameter))
    for row in rows:
        check_slots(row.module, row.path)
        if row.parameter or (row.method.part.slot == KERNEL and isinstance(kind_of(row.module), ParameterKind)):
            check_parameter(row.kernel, row.method)
        elif row.method.part.slot == KERNEL:
            check_product(row.module, row.path)
        if row.rule.axes and not row.parameter:
            raise UserError(f"{row.path} is a module whose kernel has known axes: its rule may not have axes")
    return sorted(rows, key=lambda row: row.path)


def _presets(model: nnx.Module) -> Mapping[str, str]:
    """Return the presets of a model's class: names for regular expressions for module paths."""
    return getattr(type(model), "adapter_targets", {})


def _own_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Return the modules of a model that do not belong to adapters, by path.

    A module called `delta` or `branch` belongs to adapters only if it holds a `Part`. The model may have a module of
    its own with that name.
    """
    modules = dict(nnx.iter_modules(model))
    slots = {(*path, slot) for path, module in modules.items() if is_adapted(module) for slot in SLOTS}
    return {
        join(path): module
        for path, module in modules.items()
        if not any(path[:length] in slots for length in range(1, len(path) + 1))
    }


def _own_parameters(modules: Mapping[str, nnx.Module]) -> dict[str, tuple[nnx.Module, str]]:
    """Return a dictionary from path to (module, name) for the parameters that a rule may name.

    They are the matrices and higher-rank arrays of modules. A kernel that is adapted at its product is not among them.
    """
    found = {}
    for path, module in modules.items():
        if isinstance(module, nnx.List | nnx.Dict):
            continue  # Its entries are read by index, and not as attributes.
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Param) and len(variable.shape) > 1 and not _has_product(module, path, name):
                found[f"{path}/{name}".removeprefix("/")] = (module, name)
    return found


def _has_product(module: nnx.Module, path: str, name: str) -> bool:
    """Return whether a parameter is the kernel of a module that can be adapted by the path of the module."""
    kind = kind_of(module)
    if kind is None or kind.parameter != name:
        return False
    try:
        check_product(module, path)
    except UserError:
        return False
    return True


def _nothing_to_adapt(target: str, candidates: list[str], modules: dict[str, nnx.Module], what: str) -> str:
    """Return the error message for a target that matches no module that could be adapted."""
    others = [path for path in matching(target, modules) if path not in candidates]
    if not others:
        return no_match_message(target, candidates, what)
    kinds = ", ".join(f"{path} ({type(modules[path]).__name__})" for path in others[:5])
    return (
        f"the pattern {target!r} matches no {what}, only {kinds}; there are, for example,"
        f" {', '.join(path for path in candidates[:8] if path)}"
    )
