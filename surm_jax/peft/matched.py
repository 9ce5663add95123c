"""The modules and parameters that the rules of an adapter match, and the checks of what may be adapted."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import join, matching, no_match_message
from surm_jax.peft.adapter import Adapter, Rule
from surm_jax.peft.kernels import Kernel, check_product, check_slots, kernel_of, kind_of
from surm_jax.peft.kernels.parameter import ParameterKind, check_parameter, parameter_kernel
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.owners import adapter_names
from surm_jax.peft.parts.base import KERNEL, SLOTS, Part, is_adapted


class MatchedModule(NamedTuple):
    """A module or parameter that an adapter changes, and the rule that applies to it.

    Attributes:
        path: The path of the module in the model, or of the parameter that the rule names.
        module: The module.
        rule: The rule.
        method: The rule's method, which makes the part that the adapter adds.
        parameter: The name of the parameter in the module, if the rule names a parameter.
    """

    path: str
    module: nnx.Module
    rule: Rule
    method: PartMethod
    parameter: str = ""

    @property
    def kernel(self) -> Kernel:
        """The kernel of the module that the adapter changes."""
        return parameter_kernel(self.module, self.path, self.parameter, self.rule.axes)


def matched_modules(model: nnx.Module, adapter: Adapter) -> list[MatchedModule]:
    """Return the modules that an adapter's rules select, with the rule for each, sorted by path.

    Raises:
        UserError: If a rule matches no module; if earlier rules already match all of its modules; if the method of a
            rule chooses none of the matched modules; if a matched module cannot be adapted; or if the model already
            has an adapter of this name.
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
            near = did_you_mean(rule.target, presets_of(model))
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
        _check_normalised(row, modules)
        _check_one_place(row, rows)
        if row.parameter or (row.method.part.slot == KERNEL and isinstance(kind_of(row.module), ParameterKind)):
            check_parameter(row.kernel, row.method)
        elif row.method.part.slot == KERNEL:
            check_product(row.module, row.path)
            if row.kernel.layout != kernel_of(row.module, row.path).layout:
                raise UserError(f"{row.path} is a module whose kernel has other axes: its rule needs no axes")
        elif row.rule.axes:
            raise UserError(f"{row.path} gets an addition to its output, not to a kernel: its rule may not have axes")
    return sorted(rows, key=lambda row: row.path)


def presets_of(model: nnx.Module) -> Mapping[str, str]:
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
    """Return the parameters that a rule may name, as (module, name) by path.

    They are arrays with two or more axes. For a parameter of a registered class, a rule names the module instead.
    """
    found = {}
    for path, module in modules.items():
        if isinstance(module, nnx.List | nnx.Dict):
            continue  # Its entries are read by index, and not as attributes.
        for name, variable in vars(module).items():
            kind = kind_of(module)
            registered = isinstance(kind, ParameterKind) and kind.parameter == name
            if isinstance(variable, nnx.Param) and len(variable.shape) > 1 and not registered:
                found[f"{path}/{name}".removeprefix("/")] = (module, name)
    return found


def _check_normalised(row: MatchedModule, modules: Mapping[str, nnx.Module]) -> None:
    """Check that no matched kernel is overwritten in every call by a surrounding module that normalises it.

    Raises:
        UserError: It is inside an `nnx.WeightNorm` or `nnx.SpectralNorm`.
    """
    keys = row.path.split("/") if row.path else []
    for length in range(len(keys)):
        around = modules.get("/".join(keys[:length]))
        normalises = isinstance(around, nnx.SpectralNorm)
        if isinstance(around, nnx.WeightNorm) and row.method.part.slot == KERNEL:
            inside = (*keys[length + 1 :], *([] if row.parameter else [row.kernel.parameter]))
            normalises = around.variable_filter(inside, row.kernel.variable)
        if normalises:
            raise UserError(
                f"{row.path} cannot be adapted: {type(around).__name__} overwrites its kernel with the normalised one"
                " in every call, so that an update would not be normalised, but a merged one would"
            )


def _check_one_place(row: MatchedModule, rows: Sequence[MatchedModule]) -> None:
    """Check that no module has updates both at its product and at a parameter.

    Raises:
        UserError: If it would have both.
    """
    if row.method.part.slot != KERNEL:
        return
    slot = vars(row.module).get(KERNEL) if is_adapted(row.module) else None
    held = [] if slot is None else list(vars(slot).values())
    named = any(isinstance(entry, nnx.Dict) for entry in held)
    product = any(isinstance(entry, Part) for entry in held)
    for other in rows:
        if other.module is row.module and other.method.part.slot == KERNEL:
            named, product = named or bool(other.parameter), product or not other.parameter
    if named and product:
        raise UserError(f"{row.path} cannot be adapted: its module has an update at its product and one at a parameter")


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
