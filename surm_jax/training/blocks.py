"""How a step runs the blocks of a model: equal blocks in a scan, and split weights gathered block by block.

A Python loop over the blocks is compiled to a program that grows with their number. `jax.lax.scan` compiles one block
only. Its weights are arrays `[depth, ...]`, and each iteration runs the block on one slice. On a mesh that splits the
base, every block gathers its own weights, in the forward pass and again in the backward pass: no device holds more than
one whole block.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.devices.mesh import FSDP_AXIS, all_but_gathered, gathered
from surm_jax.models import REMAT, Blocks
from surm_jax.peft.parts.dropout import keys_drawn, set_keys_drawn


class Stack(nnx.Module):
    """Several equal blocks as one module: the arrays of `stacked` are `[depth, ...]`, with one slice for each block."""

    def __init__(self, stacked: nnx.Module, depth: int) -> None:
        self.stacked, self.depth = stacked, depth


class StepBlocks(Blocks):
    """The blocks of a model as a step runs them: single blocks, and a `Stack` for several equal blocks."""

    def run(
        self, x: jax.Array, *arguments: jax.Array | None, keys: jax.Array | None, remat: str, every: bool
    ) -> tuple[jax.Array, ...]:
        """Run the blocks as `Blocks.run` does, with the same dropout keys. The results are the same up to rounding."""
        states: list[jax.Array] = [x]
        first = 0
        for part in self:
            if isinstance(part, Stack):
                key = None if keys is None else keys[first : first + part.depth]
                states += _scan(part.stacked, states[-1], arguments, key, remat, every)
                first += part.depth
            else:
                key = None if keys is None else keys[first]
                states.append(_call(part, states[-1], arguments, key, remat))
                first += 1
        return tuple(states if every else states[-1:])


def _scan(
    stacked: nnx.Module,
    x: jax.Array,
    arguments: tuple[jax.Array | None, ...],
    keys: jax.Array | None,
    remat: str,
    every: bool,
) -> list[jax.Array]:
    """Return the state after every block of a stack, or only after the last."""
    graphdef, arrays = nnx.split(stacked)
    # Use a policy even if remat is "none": without one, all gathered weights would be kept for the backward pass.
    policy = REMAT[remat] or all_but_gathered
    layer = jax.checkpoint(_layer(graphdef, arguments), prevent_cse=False, policy=policy)

    def body(carry: tuple, inputs: tuple) -> tuple:
        x, drawn = layer(*carry, *inputs)
        return (x, drawn), x if every else None

    drawn = keys_drawn()
    drawn = None if drawn is None else jnp.asarray(drawn, jnp.int32)
    states: jax.Array
    (x, drawn), states = jax.lax.scan(body, (x, drawn), (arrays, keys))
    set_keys_drawn(drawn)
    return list(states) if every else [x]


def _call(
    block: nnx.Module, x: jax.Array, arguments: tuple[jax.Array | None, ...], key: jax.Array | None, remat: str
) -> jax.Array:
    """Return the state after one block."""
    if not _is_split() and REMAT[remat] is None:
        return block(x, *arguments, key)
    graphdef, arrays = nnx.split(block)
    layer = jax.checkpoint(_layer(graphdef, arguments), policy=REMAT[remat] or all_but_gathered)
    x, drawn = layer(x, keys_drawn(), arrays, key)
    set_keys_drawn(drawn)
    return x


def _layer(graphdef: nnx.GraphDef, arguments: tuple[jax.Array | None, ...]) -> Callable:
    """Return `(x, number of keys drawn, the block's arrays, its key) -> (its output, number of keys drawn)`."""

    def layer(x: jax.Array, drawn: jax.Array | None, arrays: nnx.State, key: jax.Array | None) -> tuple:
        if _is_split():
            arrays = gathered(arrays, jax.sharding.get_abstract_mesh())
        set_keys_drawn(drawn)
        return nnx.merge(graphdef, arrays)(x, *arguments, key), keys_drawn()

    return layer


def _is_split() -> bool:
    """Return whether the mesh that `jax.set_mesh` set splits the base."""
    return jax.sharding.get_abstract_mesh().shape.get(FSDP_AXIS, 1) > 1


def runs_of(blocks: Blocks, kind_of: Callable[[tuple], Hashable]) -> list[int]:
    """Return the lengths of all runs of equal neighbouring blocks, in order.

    Two blocks are equal if they have the same structure and their variables have the same shapes, dtypes and values of
    `kind_of`.

    Args:
        blocks: The blocks of a model.
        kind_of: Takes the number of a block and the path of a variable in it, such as
            `(3, "attention", "query", "kernel")`, and returns a value that must be the same in equal blocks.
    """

    def signature(index: int) -> Hashable:
        graphdef, state = nnx.split(blocks[index])
        kinds = [(*path, v.shape, v.dtype, kind_of((index, *path))) for path, v in nnx.to_flat_state(state)]
        return graphdef, tuple(kinds)

    return [len(list(run)) for _, run in itertools.groupby(range(len(blocks)), signature)]


def as_parts(blocks: Blocks, runs: Sequence[int]) -> StepBlocks:
    """Return the blocks as a step runs them, with a `Stack` for every run of several blocks.

    The arrays of the stacked blocks are deleted as soon as they are copied into the stack, so that memory never holds
    all blocks twice.
    """
    ends = itertools.accumulate(runs)
    members = [blocks[end - depth : end] for end, depth in zip(ends, runs, strict=True)]
    return StepBlocks(run[0] if len(run) == 1 else Stack(_stacked(run), len(run)) for run in members)


def as_blocks(parts: StepBlocks) -> Blocks:
    """Return the single blocks. The blocks of stacks are copied to the host, so that they take no device memory."""
    return Blocks(block for part in parts for block in (_unstacked(part) if isinstance(part, Stack) else [part]))


def _stacked(blocks: Sequence[nnx.Module]) -> nnx.Module:
    def stacked(arrays: list[jax.Array]) -> jax.Array:
        together = jnp.stack(arrays)
        for array in arrays:
            array.delete()
        return together

    flat = zip(*(nnx.to_flat_state(nnx.state(block)) for block in blocks), strict=True)
    state = [(each[0][0], each[0][1].copy(stacked([variable[...] for _, variable in each]))) for each in flat]
    return nnx.merge(nnx.graphdef(blocks[0]), nnx.from_flat_state(state))


def _unstacked(stack: Stack) -> Iterator[nnx.Module]:
    graphdef, state = nnx.split(stack.stacked)
    arrays = jax.tree.map(np.asarray, state)
    for index in range(stack.depth):
        yield nnx.merge(graphdef, jax.tree.map(lambda array: array[index, ...], arrays))  # noqa: B023
