"""Adapt the models of other libraries, and say how much of them can be adapted and what works.

    python -m tests.peers.trial [MODEL ...]

prints a row of the table in docs/models.md for each model of `tests.peers.models` whose library is installed.
"""

import dataclasses
import math
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import surm_jax
from surm_jax import LoRA, Rule, UserError
from surm_jax.peft.kernels import kind_of
from surm_jax.peft.kernels.parameter import ParameterKind
from tests.peers.models import MODELS, Called, versions


@dataclasses.dataclass
class Trial:
    """What was found for one model.

    Attributes:
        product: The share of the entries of its matrices that get an update at their product.
        parameter: The share of those that get one at their parameter only.
        left: Why each other matrix gets none, by path.
        works: What was tried, and whether it holds.
    """

    product: float
    parameter: float
    left: dict[str, str]
    works: dict[str, bool]


def matrices(model: nnx.Module) -> dict[str, tuple[str, int, int]]:
    """Return (path of the module, number of axes, number of entries) of the weights with two axes that exceed 1."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        keys = list(map(str, path))
        if sum(size > 1 for size in variable.shape) > 1 and keys[-1] != "bias":
            found["/".join(keys)] = ("/".join(keys[:-1]), len(variable.shape), math.prod(variable.shape))
    return found


def rules_for(model: nnx.Module, inputs: Any) -> tuple[list[Rule], dict[str, str], dict[str, str]]:
    """Return rules that adapt all matrices that can be adapted, the way of each, and why the others cannot be."""
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    ways, left = {}, {}
    for path, (parent, _, _) in matrices(model).items():
        kind = kind_of(modules[parent])
        at_product = kind and not isinstance(kind, ParameterKind) and path.rpartition("/")[2] == kind.parameter
        ways[path] = "product" if at_product else "parameter"
    while True:
        rules = []
        for path, way in ways.items():
            parent, axes, _ = matrices(model)[path]
            target = re.escape(parent if way == "product" else path)
            rules.append(Rule(target, LoRA(rank=1), axes="" if way == "product" else "b" * (axes - 2) + "io"))
        try:
            surm_jax.adapt(model, rules, example=(inputs,), rngs=nnx.Rngs(0))
        except UserError as error:
            named = [path for path in ways if re.search(rf"(?<![\w/]){matrices(model)[path][0]}(?![\w])", str(error))]
            if not named:
                raise
            path = max(named, key=lambda path: (path in str(error), len(path)))
            if ways[path] == "product":
                # Its module cannot have updates in two places: all of its matrices are adapted at the parameters.
                ways |= {other: "parameter" for other in ways if matrices(model)[other][0] == matrices(model)[path][0]}
            else:
                left[path] = str(error)
                del ways[path]
        else:
            return rules, ways, left


def randomised(model: nnx.Module) -> nnx.Module:
    """Return a model with random numbers in place of arrays of zeros, which would stop its gradients."""
    model, rngs = nnx.clone(model), nnx.Rngs(7)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if variable.size > 1 and not variable[...].any():
            variable.set_value(0.1 * rngs.normal(variable.shape, variable.dtype))
    return model


def bits(tree: Any) -> list[bytes]:
    return [jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def trial(model: Called, inputs: Any) -> Trial:
    """Adapt all matrices of a model, train three steps, save, load and merge."""
    model = randomised(model)
    sizes = {path: size for path, (_, _, size) in matrices(model).items()}
    rules, ways, left = rules_for(model, inputs)
    share = lambda way: sum(sizes[path] for path in ways if ways[path] == way) / sum(sizes.values())  # noqa: E731
    adapted, adapter = surm_jax.adapt(model, rules, rngs=nnx.Rngs(0))
    run = lambda one: nnx.clone(one)(inputs)  # noqa: E731
    works = {"start equal": bits(run(adapted)) == bits(run(model))}

    graphdef, trained, frozen = nnx.split(adapted, adapter.trainable, ...)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(trained, state, frozen):
        loss = lambda t: jnp.mean(nnx.merge(graphdef, t, frozen, copy=True)(inputs) ** 2)  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state, value

    state, values, start = optimizer.init(trained), [], trained
    for _ in range(3):
        trained, state, value = step(trained, state, frozen)
        values.append(float(value))
    moved = [a != b for a, b in zip(bits(start), bits(trained), strict=True)]
    works["three steps"] = values == sorted(values, reverse=True) and all(moved) and all(map(math.isfinite, values))
    adapted = nnx.merge(graphdef, trained, frozen)
    with tempfile.TemporaryDirectory() as folder:
        surm_jax.save_adapter(f"{folder}/adapter", adapted, adapter)
        loaded, _ = surm_jax.load_adapter(f"{folder}/adapter", model)
    works["load equal"] = bits(run(loaded)) == bits(run(adapted))
    try:
        surm_jax.merge(adapted, example=(inputs,))
        works["merge"] = True
    except UserError:
        works["merge"] = False
    return Trial(share("product"), share("parameter"), left, works)


def row(name: str) -> str:
    """Return the row of a model for the table in docs/models.md."""
    found = trial(*MODELS[name].make())
    works = " | ".join("yes" if holds else "no" for holds in found.works.values())
    left = ", ".join(found.left) or "-"
    shares = f"{found.product:.1%} | {found.parameter:.1%}"
    return f"| {name} | {versions(MODELS[name].library)} | {shares} | {works} | {left} |"


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        if MODELS[name].there():
            print(row(name), flush=True)
