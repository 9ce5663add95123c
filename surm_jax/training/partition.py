"""A model in two parts: what is trained, as arrays by path, and what is frozen.

Only the trained part meets `jax.grad`, optax and checkpoints. The frozen part goes into `jit` as an argument.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.paths import join
from surm_jax.peft import Adapter
from surm_jax.training.blocks import as_blocks, as_parts, runs_of

Arrays = dict[str, jax.Array]
Tree = TypeVar("Tree")


class Slot(NamedTuple):
    """A trained variable.

    Attributes:
        path: its NNX path in the model that a step runs.
        variable: abstract.
        names: its path in the model; of a stack, the path in each of the blocks. The first is its key in `Arrays`.
    """

    path: tuple
    variable: nnx.Variable
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Partition:
    """How the trained arrays and the frozen state make a model again.

    Attributes:
        graphdef: the structure of the model that a step runs.
        slots: the trained variables.
    """

    graphdef: nnx.GraphDef
    slots: tuple[Slot, ...]

    def merge(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> nnx.Module:
        """Returns the model with these arrays, as a step runs it (`surm_jax.training.blocks`)."""
        state = [(slot.path, slot.variable.replace(trained[slot.names[0]])) for slot in self.slots]
        return nnx.merge(self.graphdef, nnx.from_flat_state(state), frozen)

    def model(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> nnx.Module:
        """Returns the model with these arrays, as it was; what was stacked is copied to the host."""
        model = self.merge(trained, frozen)
        model.blocks = as_blocks(model.blocks)
        return model

    def by_block(self, tree: Tree) -> Tree:
        """Returns a tree, such as a state of training, with dictionaries for the model in place of those for a step.

        Stacked arrays are taken apart, so that files hold the same whether blocks are stacked or not.
        """

        def apart(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: arrays[name] if len(names) == 1 else jax.tree.map(lambda leaf: leaf[index], arrays[names[0]])  # noqa: B023
                for _, _, names in self.slots
                for index, name in enumerate(names)
            }

        return _map_dicts(apart, tree, {slot.names[0] for slot in self.slots})

    def by_step(self, tree: Tree) -> Tree:
        """The inverse of `by_block`."""

        def together(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {
                names[0]: _stack([arrays[name] for name in names]) if len(names) > 1 else arrays[names[0]]
                for _, _, names in self.slots
            }

        return _map_dicts(together, tree, {name for slot in self.slots for name in slot.names})


def partition(
    model: nnx.Module,
    adapter: Adapter,
    *,
    scan_layers: bool = False,
    group_of: Callable[[str], Hashable] = lambda path: None,
) -> tuple[Partition, Arrays, nnx.State]:
    """Splits an adapted model once.

    Args:
        model: has `blocks`. Those that are stacked lose their arrays: the model cannot be used any more.
        adapter: says what is trained.
        scan_layers: whether equal neighbours among the blocks are stacked, to be one program for a step. Blocks that
            differ, because rules give something to some of them alone, are not; they cost what they cost without.
        group_of: of the path of a trained variable, the group in which the optimiser has it. Blocks are equal if these
            are.

    Returns:
        The partition, the trained arrays by path, and the frozen state.
    """
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, adapter.trainable))}

    def kind_of(path: tuple) -> Hashable:
        return group_of(join(("blocks", *path))) if ("blocks", *path) in trained else False

    runs = runs_of(model.blocks, kind_of) if scan_layers else [1] * len(model.blocks)
    model = nnx.merge(*nnx.split(model))
    model.blocks = as_parts(model.blocks, runs)
    blocks = list(itertools.accumulate(runs, initial=0))

    def paths_of(path: tuple) -> list[tuple]:
        """The paths in the model for one in what a step runs."""
        if path[0] != "blocks":
            return [path]
        rest = path[3:] if runs[path[1]] > 1 else path[2:]
        return [("blocks", block, *rest) for block in range(*blocks[path[1] : path[1] + 2])]

    graphdef, state, frozen = nnx.split(model, lambda path, _: paths_of(path)[0] in trained, ...)
    slots = tuple(
        Slot(path, nnx.as_abstract(variable), tuple(join(path) for path in paths_of(path)))
        for path, variable in nnx.to_flat_state(state)
    )
    arrays = {slot.names[0]: variable[...] for slot, (_, variable) in zip(slots, nnx.to_flat_state(state), strict=True)}
    return Partition(graphdef, slots), arrays, frozen


def _map_dicts(fn: Callable[[dict], dict], tree: Tree, keys: set[str]) -> Tree:
    """Returns a tree with `fn` of every dictionary in it that has these keys."""
    chosen = lambda node: isinstance(node, dict) and node.keys() == keys  # noqa: E731
    return jax.tree.map(lambda node: fn(node) if chosen(node) else node, tree, is_leaf=chosen)


def _stack(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
