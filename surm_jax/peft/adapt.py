"""Putting an adapter into a model."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.paths import join, matching, no_match_message, require_match
from surm_jax.peft.adapter import DEFAULT_NAME, SLOTS, Adapter, Rule
from surm_jax.peft.kernels import check_call, is_linear, matrix_view, output_width
from surm_jax.peft.methods.base import Bottleneck, Update
from surm_jax.peft.parts.attach import attach
from surm_jax.peft.parts.branch import Branch
from surm_jax.peft.parts.update import Delta
from surm_jax.peft.parts.variables import AdapterParam
from surm_jax.structured import Placed, StructuredMatrix, Sum


def adapt(
    model: nnx.Module,
    rules: Sequence[Rule],
    *,
    train: Sequence[str] = (),
    name: str = DEFAULT_NAME,
    execution: str = "auto",
    rngs: nnx.Rngs,
) -> tuple[nnx.Module, Adapter]:
    """Returns a model with an adapter that starts at zero, so that it computes what `model` computes.

    `model` itself stays as it is; both hold the same arrays, no copies. It may have adapters of other names: all are
    added to the same outputs.

    >>> import surm_jax
    >>> model = nnx.Dict(query=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), head=nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    >>> adapted, adapter = adapt(
    ...     model, [Rule("query", surm_jax.CirculantUpdate())], train=["head/.*"], rngs=nnx.Rngs(2)
    ... )
    >>> adapted.query.delta["default"].r1.shape
    (8,)

    Args:
        model: any NNX model, abstract ones included. Its class may have named targets for rules, `adapter_targets`:
            {name: regular expression}.
        rules: which modules get which method; the first that matches a module counts.
        train: patterns of the paths of parameters that are trained besides.
        name: of the adapter.
        execution: how updates are computed: `auto`, `fft`, `dense` or `fused`; all give the same to
            rounding (`surm_jax.structured.products.execution`).
        rngs: the stream `params` draws the random factors.

    Returns:
        The adapted model, and the adapter with the filter of what is trained (`adapter.trainable`).

    Raises:
        UserError: if a rule or a pattern matches nothing, or a module that cannot be adapted, or if the model has an
            adapter of this name.
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
    rules = (dataclasses.replace(rule, target=presets.get(rule.target, rule.target)) for rule in rules)
    adapter = Adapter(tuple(rules), tuple(train), name)
    for path, module, rule in matched_modules(model, adapter):
        if isinstance(rule.method, Update):
            matrix_view(module, path)  # whose messages name the layer themselves
        try:
            attach(module, name, make_part(rule, path, module, execution, rngs.params()))
        except UserError as error:
            raise UserError(f"{path or 'the model'} cannot be adapted: {error}") from None
    base = list(base_parameters(model))
    for pattern in adapter.train:
        require_match(pattern, base, "parameter")
    return model, adapter


def make_part(rule: Rule, path: str, module: nnx.Module, execution: str, key: jax.Array) -> Delta | Branch:
    """Builds what a rule gives a module, as it is at the start of training; abstract where the module is."""

    def make(kernel: jax.Array | None, key: jax.Array) -> Delta | Branch:
        if isinstance(rule.method, Bottleneck):
            return Branch(rule.method, rule.method.init_branch(key, output_width(module, path)))
        shape = matrix_view(module, path).shape
        return Delta(rule.method, start_in_parts(rule, key, shape), kernel.reshape(shape), execution)

    kernel = module.kernel.get_value() if isinstance(rule.method, Update) else None
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    return nnx.eval_shape(make, kernel, key) if abstract else make(kernel, key)


def start_in_parts(rule: Rule, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
    """Returns the matrix that an update starts from; where it updates some parts of a kernel, the sum of theirs."""
    m, n = shape
    if rule.parts == 1:
        return rule.method.start(key, shape)
    if n % rule.parts:
        raise UserError(f"its {n} output features are not {rule.parts} equal parts")
    width = n // rule.parts
    blocks = [
        Placed(rule.method.start(jax.random.fold_in(key, part), (m, width)), shape, (0, part * width))
        for part in rule.which or range(rule.parts)
    ]
    return Sum(blocks) if len(blocks) > 1 else blocks[0]


def base_parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """Returns the parameters that no adapter brought, by path."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {join(path): variable for path, variable in parameters if not isinstance(variable, AdapterParam)}


def matched_modules(model: nnx.Module, adapter: Adapter) -> list[tuple[str, nnx.Module, Rule]]:
    """Returns (path, module, rule) for every module that an adapter's rule gives something to, by path.

    Raises:
        UserError: if a rule matches no module, or only modules that earlier rules have, or one that cannot be adapted,
            or its method leaves out all that it matches, or if the model has an adapter of this name.
    """
    if any(name == adapter.name for _, name, *_ in adapted_modules(model)):
        raise UserError(
            f"the model has an adapter called {adapter.name!r} already: merge or delete it, or choose another name"
        )
    modules = _own_modules(model)
    linear = sorted(path for path, module in modules.items() if is_linear(module))
    callable_ = sorted(path for path, module in modules.items() if callable(module))
    chosen: dict[str, Rule] = {}
    for rule in adapter.rules:
        candidates = linear if isinstance(rule.method, Update) else callable_
        found = matching(rule.target, candidates)
        if not found:
            near = did_you_mean(rule.target, _presets(model))
            raise UserError(_nothing_to_adapt(rule, candidates, modules) + near)
        if rule.method:
            try:
                found = rule.method.choose(found)
            except UserError as error:
                raise UserError(f"the rule {rule.target!r} adapts nothing: {error}") from None
        new = [path for path in found if path not in chosen]
        if not new:
            raise UserError(f"the rule {rule.target!r} has no effect: earlier rules take every module that it matches")
        chosen.update(dict.fromkeys(new, rule))
    for path, rule in chosen.items():
        if rule.method:
            check_call(modules[path], path, "delta" if isinstance(rule.method, Update) else "branch")
    return [(path, modules[path], chosen[path]) for path in sorted(chosen) if chosen[path].method]


def _presets(model: nnx.Module) -> Mapping[str, str]:
    """Returns the targets that a model has names for."""
    return getattr(type(model), "adapter_targets", {})


def _own_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns the modules that no adapter brought, by path. A name alone, such as `branch`, may be the model's own."""
    modules = dict(nnx.iter_modules(model))
    slots = {path[:-1] for path, module in modules.items() if isinstance(module, Delta | Branch)}
    return {
        join(path): module
        for path, module in modules.items()
        if not any(path[:length] in slots for length in range(1, len(path) + 1))
    }


def _nothing_to_adapt(rule: Rule, candidates: list[str], modules: dict[str, nnx.Module]) -> str:
    what = "linear layer" if isinstance(rule.method, Update) else "module"
    others = [path for path in matching(rule.target, modules) if path not in candidates]
    if not others:
        return no_match_message(rule.target, candidates, what)
    kinds = ", ".join(f"{path} ({type(modules[path]).__name__})" for path in others[:5])
    return (
        f"the pattern {rule.target!r} matches no {what}, only {kinds}; there are, for example,"
        f" {', '.join(path for path in candidates[:8] if path)}"
    )


def adapted_modules(model: nnx.Module) -> Iterator[tuple[str, str, Delta | Branch, nnx.Module]]:
    """Yields (path, name of the adapter, its part, the module) for every part of an adapter, by path and name."""
    found = []
    for path, module in nnx.iter_modules(model):
        for slot in SLOTS:
            for name, part in vars(module).get(slot, {}).items() if hasattr(type(module), "original_class") else ():
                found.append((join(path), name, part, module))
    yield from sorted(found, key=lambda row: row[:2])
