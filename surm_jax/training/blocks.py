"""The execution of a model's transformer blocks inside the compiled training or evaluation step.

If JAX traces a Python loop over the blocks, the compiled program grows with the number of blocks. `jax.lax.scan`
compiles the code of equal blocks only once. It needs their weights stacked along a new first axis: the query kernels of
12 blocks, of shape (768, 768), become one array of shape (12, 768, 768). Each iteration runs the block with one slice.

If the device mesh has several devices along its axis `fsdp`, the large weights of the frozen base model are sharded
over them. Every block then gathers its own weights just before it uses them, in the forward and in the backward pass.
Thus no device needs to hold the complete weights of more than one block at a time.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.devices.mesh import FSDP_AXIS, all_but_gathered, gathered
from surm_jax.models import REMAT, Blocks
from surm_jax.models.layers import call_block
from surm_jax.peft.parts.dropout import keys_drawn, set_keys_drawn


class Stack(nnx.Module):
    """Several equal blocks in one module, with stacked arrays.

    Attributes:
        stacked: A block whose arrays have an additional first axis of length `depth`. Slice `i` along this axis holds
            the arrays of block `i`.
        depth: The number of blocks.
    """

    def __init__(self, stacked: nnx.Module, depth: int) -> None:
        self.stacked, self.depth = stacked, depth


class StepBlocks(Blocks):
    """A model's list of blocks as the compiled steps run it: each item is a block, or a `Stack` of equal neighbours."""

    def run(self, x: Any, *arguments: Any, keys: jax.Array | None, remat: str, every: bool) -> tuple[Any, ...]:
        """Run all blocks in order. The results are those of `surm_jax.models.layers.Blocks.run` up to rounding.

        The arguments and the dropout keys are the same, too.
        """
        states: list[Any] = [x]
        first = 0
        for part in self:
            if isinstance(part, Stack):
                key = None if keys is None else keys[first : first + part.depth]
                states += _scan(part.stacked, states[-1], arguments, key, remat, every)
                first += part.depth
            else:
                key = None if keys is None else keys[first]
                policy = REMAT[remat] or (all_but_gathered if _is_split() else None)
                inputs = keys_drawn(), states[-1], *arguments, key
                x, drawn = call_block(part, *inputs, policy=policy, call=_call)
                set_keys_drawn(drawn)
                states.append(x)
                first += 1
        return tuple(states if every else states[-1:])

    def between(self, first: int, last: int | None) -> "StepBlocks":
        """Return the blocks with the indices `first` to `last - 1`, as in `Blocks.between`.

        Raises:
            ValueError: The range begins or ends inside a stack.
        """
        depths = [part.depth if isinstance(part, Stack) else 1 for part in self]
        starts = list(itertools.accumulate(depths, initial=0))
        return StepBlocks(self[starts.index(first) : None if last is None else starts.index(last)])


def _scan(
    stacked: nnx.Module,
    x: Any,
    arguments: tuple,
    keys: jax.Array | None,
    remat: str,
    every: bool,
) -> list[Any]:
    """Run the blocks of a stack in one `jax.lax.scan`, and return the output of every block or only of the last one."""
    graphdef, arrays = nnx.split(stacked)
    # Use a rematerialisation policy even if remat is "none". Without one, JAX would keep the gathered weights of all
    # blocks for the backward pass.
    policy = REMAT[remat] or all_but_gathered

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def layer(carry: tuple, inputs: tuple) -> tuple:
        (x, drawn), (arrays, key) = carry, inputs
        x, drawn = _call(nnx.merge(graphdef, arrays), drawn, x, *arguments, key)
        return (x, drawn), x if every else None

    drawn = keys_drawn()
    drawn = None if drawn is None else jnp.asarray(drawn, jnp.int32)
    (x, drawn), states = jax.lax.scan(layer, (x, drawn), (arrays, keys))
    set_keys_drawn(drawn)
    if not every:
        return [x]
    leaves, structure = jax.tree.flatten(states)
    return [jax.tree.unflatten(structure, each) for each in zip(*leaves, strict=True)]


def _call(block: nnx.Module, drawn: jax.Array | None, *arguments: jax.Array | None) -> tuple:
    """Return `(block(*arguments), drawn)`. If the block's weights are sharded over devices, gather them first.

    `drawn` counts the dropout keys that adapters have drawn in this forward pass. It is passed through, because a value
    that is traced inside `jax.lax.scan` or `jax.checkpoint` cannot be used outside.
    """
    if _is_split():
        graphdef, arrays = nnx.split(block)
        block = nnx.merge(graphdef, gathered(arrays, jax.sharding.get_abstract_mesh()))
    set_keys_drawn(drawn)
    return block(*arguments), keys_drawn()


def _is_split() -> bool:
    """Return whether the current mesh, set by `jax.set_mesh`, shards the weights of the frozen base model."""
    return jax.sharding.get_abstract_mesh().shape.get(FSDP_AXIS, 1) > 1


def runs_of(blocks: Blocks, kind_of: Callable[[tuple], Hashable]) -> list[int]:
    """Count how many neighbouring blocks are equal, so that they can be stacked.

    The result `[1, 11]` means that the first of 12 blocks differs from the others, which are all equal. Two blocks are
    equal if they have the same structure, if their variables have the same shapes and dtypes, and if `kind_of` returns
    the same value for them.

    Args:
        blocks: The blocks of a model.
        kind_of: A function from a variable to its kind, for example its optimiser group. Its argument is the index of
            the block and the path of the variable in it, such as `(3, "attention", "query", "kernel")`.
    """

    def signature(index: int) -> Hashable:
        graphdef, state = nnx.split(blocks[index])
        kinds = [(*path, v.shape, v.dtype, kind_of((index, *path))) for path, v in nnx.to_flat_state(state)]
        return graphdef, tuple(kinds)

    return [len(list(run)) for _, run in itertools.groupby(range(len(blocks)), signature)]


def as_parts(blocks: Blocks, runs: Sequence[int]) -> StepBlocks:
    """Replace each sequence of equal neighbouring blocks with a `Stack`, and return the result as `StepBlocks`.

    The arrays of the original blocks are deleted as soon as they are copied, so that the device never holds all blocks
    twice.

    Args:
        blocks: The blocks of a model.
        runs: The lengths of the sequences, as `runs_of` returns them. A sequence of length 1 stays a single block.
    """
    ends = itertools.accumulate(runs)
    members = [blocks[end - depth : end] for end, depth in zip(ends, runs, strict=True)]
    return StepBlocks(run[0] if len(run) == 1 else Stack(_stacked(run), len(run)) for run in members)


def as_blocks(parts: StepBlocks) -> Blocks:
    """Turn all stacks into single blocks again. This is the inverse of `as_parts`.

    The arrays of a stack are first copied to host memory, so that no device memory is needed.
    """
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
