"""Check that updates act: that they reach the output of a model, and that nothing else reads an adapted kernel.

A model may call a layer without using its output, and then its update learns nothing. Or it may read the kernel itself,
past the layer's product, and then merging changes more than the update did. `check` finds both in the traced program of
the model's gradients, without computing anything.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval

from surm_jax.errors import UserError
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.kernels.base import probed_kernels
from surm_jax.peft.lifecycle import kernel_at, parts_of
from surm_jax.peft.parts.base import KERNEL, AdapterParam, AttachedPart, iter_parts

TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
"""The largest difference of a merged model's outputs, relative to the largest output, by the dtype of the output."""

HALF_PRECISION = 2.0**-5
"""The same for the dtypes of half precision, in which merging an update moves where a model rounds."""


def check(model: nnx.Module, adapter: Adapter, inputs: Any) -> None:
    """Check that every update of an adapter acts on the output of a model, and is the only change that merging makes.

    Nothing is computed: the model is traced with abstract arrays, so that it may be abstract itself.

    >>> import surm_jax
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.layer, self.unused = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
    ...
    ...     def __call__(self, x):
    ...         return self.layer(x)
    >>> model, adapter = surm_jax.adapt(Model(nnx.Rngs(0)), [surm_jax.Rule(".*", surm_jax.LoRA())], rngs=nnx.Rngs(1))
    >>> check(model, adapter, jnp.ones((2, 4)))
    Traceback (most recent call last):
    surm_jax.errors.UserError: the part of unused does not reach the output of the model: leave it out

    Args:
        model: An adapted model.
        adapter: The adapter.
        inputs: The input with which the model is called, or a tuple of positional arguments. They may be abstract.

    Raises:
        UserError: If the gradient of a part is zero whatever the values are, or if the model reads an adapted kernel in
            another place than the product to which the update is added.
    """
    rows = parts_of(model, adapter)
    for row, reached in zip(rows, _reach(model, rows, inputs, parts=True), strict=True):
        if not reached:
            raise UserError(
                f"the part of {row.path or 'the model'} does not reach the output of the model: leave it out"
            )
    kernels = [row for row in rows if row.part.slot == KERNEL and not kernel_at(row).quantised]
    for row, reached in zip(kernels, _reach(model, kernels, inputs, parts=False), strict=True):
        if reached:
            parameter = f"{row.path}/{kernel_at(row).parameter}".removeprefix("/")
            advice = "" if row.part.parameter else f": name the parameter {parameter} in the rule instead"
            raise UserError(
                f"the model reads the kernel of {row.path or 'the model'} in another place too, where the update is not"
                f" added{advice}"
            )


def _reach(model: nnx.Module, rows: list[AttachedPart], inputs: Any, *, parts: bool) -> list[bool]:
    """Return, for each part, whether the model's output can depend on it: whether a gradient can be non-zero.

    Args:
        model: The adapted model.
        rows: The parts.
        inputs: The inputs of the model.
        parts: True for the gradient by the part's parameters. False for that by the kernel, which counts as a constant
            in the product to which the part is added.
    """
    if not rows:
        return []
    model = nnx.clone(model)
    copies = {(row.path, row.name, row.part.slot): row for row in iter_parts(model)}
    watched: list[list[Any]] = []
    for row in rows:
        own = copies[row.path, row.name, row.part.slot]
        if parts:
            watched.append([v for v in own.part.tensors().values() if isinstance(v, AdapterParam)])
        else:
            # Merging gives the layer a kernel of its own. What other layers do with a shared one does not count.
            kernel = kernel_at(own)
            setattr(kernel.module, kernel.parameter, kernel.variable.copy(kernel.variable.get_value()))
            watched.append([kernel.variable])
    names = {id(variable): k for k, variables in enumerate(watched) for variable in variables}
    chosen = {path: names[id(v)] for path, v in nnx.to_flat_state(nnx.state(model, nnx.Variable)) if id(v) in names}
    graphdef, state, rest = nnx.split(model, lambda path, value: path in chosen, ...)  # type: ignore[misc]
    owners = [chosen[path] for path, _ in nnx.to_flat_state(state)]
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)

    def outputs(state: nnx.State, rest: nnx.State, arguments: tuple[Any, ...]) -> list[jax.Array]:
        if parts:
            y = nnx.merge(graphdef, state, rest, copy=True)(*arguments)
        else:
            with probed_kernels():
                y = nnx.merge(graphdef, state, rest, copy=True)(*arguments)
        return [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def gradient(cotangents: list[jax.Array], state: nnx.State, *others: Any) -> list[jax.Array]:
        _, back = jax.vjp(lambda state: outputs(state, *others), state)
        return [v.get_value() for _, v in nnx.to_flat_state(back(cotangents)[0])]

    cotangents = jax.eval_shape(outputs, state, rest, arguments)
    jaxpr = jax.make_jaxpr(gradient)(cotangents, state, rest, arguments).jaxpr
    reached = [False] * len(rows)
    for owner in range(len(rows)):
        _, used = partial_eval.dce_jaxpr(jaxpr, [other == owner for other in owners])
        reached[owner] = any(used[: len(cotangents)])
    return reached


def check_merged(model: nnx.Module, merged: nnx.Module, example: Any) -> None:
    """Check that a merged model computes what the adapted one computes for an example.

    Args:
        model: The adapted model.
        merged: The merged model.
        example: The input with which the model is called, or a tuple of positional arguments.

    Raises:
        UserError: If an output differs by more than rounding.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    ours, theirs = (jax.tree.leaves(nnx.clone(one)(*arguments)) for one in (merged, model))
    for mine, other in zip(ours, theirs, strict=True):
        if not jnp.issubdtype(other.dtype, jnp.floating):
            continue
        left, right = (np.asarray(array).astype(np.float64) for array in (mine, other))
        error = np.abs(left - right).max(initial=0) / max(np.abs(right).max(initial=0), np.finfo(np.float32).tiny)
        if not error <= TOLERANCES.get(str(other.dtype), HALF_PRECISION):
            raise UserError(
                f"the merged model computes something else: its output for the example differs by {error:.1e} of the"
                " largest entry. A kernel may have a second reader, which surm_jax.check names, or its dtype may be too"
                " coarse for the update"
            )
