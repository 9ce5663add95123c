"""A model in two parts: the trained arrays by path, and the frozen state.

Only the trained arrays are differentiated, updated and saved. The frozen state is a plain argument of the jitted step.
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
        path: Its NNX path in the model that a step runs.
        variable: The abstract variable, without its value.
        names: Its path in the original model. A variable of a stack has one path for each block. The first path is its
            key in `Arrays`.
    """

    path: tuple
    variable: nnx.Variable
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Partition:
    """The way to put trained arrays and frozen state back together into a model.

    Attributes:
        graphdef: The structure of the model that a step runs.
        slots: The trained variables.
    """

    graphdef: nnx.GraphDef
    slots: tuple[Slot, ...]

    def merge(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> Any:
        """Return the model with these arrays, as a step runs it (`surm_jax.training.blocks`)."""
        state = [(slot.path, slot.variable.replace(trained[slot.names[0]])) for slot in self.slots]
        return nnx.merge(self.graphdef, nnx.from_flat_state(state), frozen)

    def model(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> nnx.Module:
        """Return the model with these arrays and single blocks, as before the split. Stacks are copied to the host."""
        model = self.merge(trained, frozen)
        model.blocks = as_blocks(model.blocks)
        return model

    def by_block(self, tree: Tree) -> Tree:
        """Return a tree, such as a training state, with one entry for each block instead of one for each stack.

        This changes every dictionary of trained arrays in the tree. Checkpoints in this form do not depend on whether
        blocks are stacked.
        """

        def apart(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: arrays[name] if len(names) == 1 else jax.tree.map(lambda leaf: leaf[index], arrays[names[0]])  # noqa: B023
                for _, _, names in self.slots
                for index, name in enumerate(names)
            }

        return _map_dicts(apart, tree, {slot.names[0] for slot in self.slots})

    def by_step(self, tree: Tree) -> Tree:
        """Return a tree with one entry for each stack: the inverse of `by_block`."""

        def together(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {
                names[0]: _stack([arrays[name] for name in names]) if len(names) > 1 else arrays[names[0]]
                for _, _, names in self.slots
            }

        return _map_dicts(together, tree, {name for slot in self.slots for name in slot.names})


def partition(
    model: Any,
    adapter: Adapter,
    *,
    scan_layers: bool = False,
    group_of: Callable[[str], Hashable] = lambda path: None,
) -> tuple[Partition, Arrays, nnx.State]:
    """Split an adapted model into trained and frozen arrays.

    Args:
        model: An adapted model with `blocks`. If blocks are stacked, their arrays are deleted, and this model cannot be
            used afterwards.
        adapter: Says which parameters are trained.
        scan_layers: Whether to stack equal neighbouring blocks, so that a step compiles them once. Blocks that differ,
            for example because a rule adapts only some of them, are not stacked.
        group_of: Takes the path of a trained variable and returns its group in the optimiser. Only blocks with the same
            groups are stacked.

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
        """Return the paths in the original model of a variable of the model that a step runs."""
        if path[0] != "blocks":
            return [path]
        rest = path[3:] if runs[path[1]] > 1 else path[2:]
        return [("blocks", block, *rest) for block in range(*blocks[path[1] : path[1] + 2])]

    graphdef, state, *rest = nnx.split(model, lambda path, _: paths_of(path)[0] in trained, ...)
    (frozen,) = rest
    slots = tuple(
        Slot(path, nnx.as_abstract(variable), tuple(join(path) for path in paths_of(path)))
        for path, variable in nnx.to_flat_state(state)
    )
    arrays = {slot.names[0]: variable[...] for slot, (_, variable) in zip(slots, nnx.to_flat_state(state), strict=True)}
    return Partition(graphdef, slots), arrays, frozen


def _map_dicts(fn: Callable[[dict], dict], tree: Tree, keys: set[str]) -> Tree:
    """Return a tree in which `fn` is applied to every dictionary with exactly these keys."""
    chosen = lambda node: isinstance(node, dict) and node.keys() == keys  # noqa: E731
    return jax.tree.map(lambda node: fn(node) if chosen(node) else node, tree, is_leaf=chosen)


def _stack(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
