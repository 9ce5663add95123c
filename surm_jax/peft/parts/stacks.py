"""Stacks of parts: one `Part` whose variables have the same leading axes, for the matrices of a stack of layers.

`surm_jax.peft.parts.base.over_stack` computes with the parts of a stack. The functions of this file make stacks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.peft.parts.base import Part


def stacked(make: Callable[..., Part], stack: tuple[int, ...], *arrays: Any) -> Part:
    """Call `make` for each entry of some arrays, and stack the parts that it returns.

    Args:
        make: A function that returns a part. All parts must have the same structure.
        stack: The shape of the stack. If it is empty, the result is the part `make(*arrays)`.
        *arrays: Pytrees of arrays whose leading axes are those of the stack.
    """
    if not stack:
        return make(*arrays)
    structure: Any = None

    def one(*arrays: Any) -> nnx.State:
        nonlocal structure
        structure, state = nnx.split(stacked(make, stack[1:], *arrays))
        return state

    state = jax.vmap(one)(*arrays)
    return nnx.merge(structure, state)


def changed(function: Callable[[Any], Part], part: Part) -> Part:
    """Apply a function to each part of a stack, and stack the parts that it returns."""
    graphdef, state = nnx.split(part)
    return stacked(lambda state: function(nnx.merge(graphdef, state)), part.stack, state)


def compacted(part: Part) -> Part:
    """Return a copy of a part, or of a stack of parts, with the smallest arrays that give the same result."""

    def compact(part: Part) -> Part:
        part.compact()
        return part

    return changed(compact, nnx.clone(part))


def one_of(part: Part) -> Any:
    """Return an abstract part with the structure of one in a stack, or the part itself if it is not a stack."""
    if not part.stack:
        return part
    graphdef, state = nnx.split(part)
    depth = len(part.stack)

    def entry(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[depth:], leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(entry, state))


def fitted(part: Any, target: Float[np.ndarray, "*stack in out"]) -> tuple[Part, Float[np.ndarray, "*stack in out"]]:
    """Fit a part, or a stack of parts, so that its `change` is as near as possible to a target.

    Returns:
        The part and its change.

    Raises:
        UserError: If no method to find such a part is implemented (`Part.fit`).
    """
    if not part.stack:
        return part, part.fit(target)
    graphdef, state = nnx.split(part)
    entries = []
    for index in range(part.stack[0]):
        entry = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], state))
        entries.append(fitted(entry, target[index]))
    states = [nnx.split(entry)[1] for entry, _ in entries]
    result = nnx.merge(nnx.graphdef(entries[0][0]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    return result, np.stack([change for _, change in entries])


def scaled(part: Part, scale: float | Array) -> None:
    """Set the scale of a part, or of all parts of a stack, in place."""
    part.scale.set_value(jnp.broadcast_to(jnp.asarray(scale, jnp.float32), part.stack))
