"""Putting updates into a model, and taking them out again by merging."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import join, matching, no_match_message, require_match
from surm_jax.peft.adapter import Adapter, Rule
from surm_jax.peft.delta import Adapted, AdapterParam, Delta, attach, detach
from surm_jax.peft.layers import check_call, is_linear, matrix_view


def adapt(
    model: nnx.Module, rules: Sequence[Rule], *, train: Sequence[str] = (), execution: str = "auto", rngs: nnx.Rngs
) -> tuple[nnx.Module, Adapter]:
    """Returns a model with updates that start at zero, so that it computes what `model` computes.

    `model` itself stays as it is; both hold the same arrays, no copies.

    >>> import surm_jax
    >>> model = nnx.Dict(query=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), head=nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    >>> adapted, adapter = adapt(
    ...     model, [Rule("query", surm_jax.CirculantUpdate())], train=["head/.*"], rngs=nnx.Rngs(2)
    ... )
    >>> adapted.query.delta.r1.shape
    (8,)

    Args:
      model: any NNX model, abstract ones included.
      rules: which linear layers get which update; the first that matches a layer counts.
      train: patterns of the paths of parameters that are trained besides the updates.
      execution: how the updates are computed: `auto`, `fft`, `dense` or `fused` (`surm_jax.structured.execution`);
        all give the same to rounding.
      rngs: the stream `params` draws the random factors.

    Returns:
      The adapted model, and the adapter with the filter of what is trained (`adapter.trainable`).

    Raises:
      UserError: if a rule or a pattern matches nothing, or a layer that cannot be adapted.
    """
    if isinstance(train, str):
        raise UserError(f"train must be a list of patterns, got one string: write [{train!r}]")
    model = nnx.clone(model)
    adapter = Adapter(tuple(rules), tuple(train))
    for path, layer, rule in matched_layers(model, adapter.rules):
        shape = matrix_view(layer, path).shape
        try:
            matrix = rule.update.init(rngs.params(), shape)
        except UserError as error:
            raise UserError(f"{path} cannot be adapted: {error}") from None
        attach(layer, Delta(matrix, rule.update.factor(shape), execution))
    base = list(base_parameters(model))
    for pattern in adapter.train:
        require_match(pattern, base, "parameter")
    return model, adapter


def base_parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """Returns the parameters that are not an update's, by path."""
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {join(path): variable for path, variable in parameters if not isinstance(variable, AdapterParam)}


def matched_layers(model: nnx.Module, rules: Sequence[Rule]) -> list[tuple[str, nnx.Module, Rule]]:
    """Returns (path, layer, rule) for every layer that a rule matches, by path.

    Raises:
      UserError: if a rule matches no layer, or only layers that earlier rules have, or a layer that cannot be adapted,
        or if the model is adapted already.
    """
    modules = {join(path): module for path, module in nnx.iter_modules(model)}
    linear = sorted(path for path, module in modules.items() if is_linear(module))
    for path, module in modules.items():
        if isinstance(module, Adapted):
            raise UserError(f"{path} is adapted already: merge that adapter first, or start from the base model")
    chosen: dict[str, Rule] = {}
    for rule in rules:
        found = matching(rule.target, linear)
        if not found:
            raise UserError(_nothing_to_adapt(rule.target, linear, modules))
        new = [path for path in found if path not in chosen]
        if not new:
            raise UserError(f"the rule {rule.target!r} has no effect: earlier rules take every layer that it matches")
        chosen.update(dict.fromkeys(new, rule))
    for path in chosen:
        check_call(modules[path], path)
    return [(path, modules[path], chosen[path]) for path in sorted(chosen)]


def _nothing_to_adapt(target: str, linear: list[str], modules: dict[str, nnx.Module]) -> str:
    others = [path for path in matching(target, modules) if path not in linear]
    if not others:
        return no_match_message(target, linear, "linear layer")
    kinds = ", ".join(f"{path} ({type(modules[path]).__name__})" for path in others[:5])
    return (
        f"the pattern {target!r} matches no linear layer, only {kinds}; the linear layers are {', '.join(linear[:8])}"
    )


def adapted_layers(model: nnx.Module) -> Iterator[tuple[str, Adapted]]:
    """Yields (path, layer) of the adapted layers, by path."""
    layers = {join(path): module for path, module in nnx.iter_modules(model) if isinstance(module, Adapted)}
    yield from sorted(layers.items())


def merge(model: nnx.Module) -> tuple[nnx.Module, float]:
    """Returns a plain model whose kernels hold `W + factor * dW`, summed in float32.

    `model` itself stays as it is. Merging a model without updates returns an equal model.

    >>> import surm_jax
    >>> model, _ = adapt(
    ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1)
    ... )
    >>> merged, deviation = merge(model)
    >>> type(merged).__name__, deviation
    ('Linear', 0.0)

    Returns:
      The merged model, and the largest deviation of a merged entry from the exact sum (in float64): what rounding to
      the kernel's dtype cost. For a bfloat16 kernel this can exceed a small update.
    """
    model = nnx.clone(model)
    deviation = 0.0
    for path, layer in adapted_layers(model):
        kernel, delta = layer.kernel[...], layer.delta
        dense = delta.matrix().to_dense().reshape(kernel.shape)
        merged = (kernel.astype(jnp.float32) + delta.factor * dense.astype(jnp.float32)).astype(kernel.dtype)
        exact = _float64(kernel) + delta.factor * _float64(dense)
        if not np.isfinite(exact).all():
            raise UserError(f"{path} cannot be merged: its update or its kernel holds values that are not finite")
        deviation = max(deviation, float(np.max(np.abs(_float64(merged) - exact), initial=0.0)))
        layer.kernel[...] = merged
        detach(layer)
    return model, deviation


def _float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)
