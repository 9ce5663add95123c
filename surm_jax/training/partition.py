"""Divide an adapted model into its trained arrays and its frozen state, and put them together again.

Only the trained arrays are differentiated, updated and saved in checkpoints. The frozen state is an argument of the
jitted training step that the step does not change.

Before the division, equal neighbouring blocks may be stacked (`surm_jax.training.blocks`). Training and evaluation run
the stacked model. In this file, "the original model" is the model before stacking.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.models import Model
from surm_jax.paths import join
from surm_jax.peft import Adapter
from surm_jax.training.blocks import as_blocks, as_parts, runs_of

Arrays = dict[str, jax.Array]
Tree = TypeVar("Tree")


class Slot(NamedTuple):
    """The place of one trained variable in the stacked and in the original model.

    Attributes:
        path: The NNX path of the variable in the stacked model.
        variable: The variable without its value (`nnx.as_abstract`).
        names: The paths of the variable in the original model, joined by slashes: one, or one for each block of a
            stack. The first is the key of its array in a dictionary of trained arrays.
    """

    path: tuple
    variable: nnx.Variable
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a model was divided. The methods put trained arrays and frozen state together again.

    Attributes:
        graphdef: The structure of the stacked model.
        slots: The places of all trained variables.
    """

    graphdef: nnx.GraphDef
    slots: tuple[Slot, ...]

    def merge(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> Any:
        """Put trained arrays and frozen state together into the stacked model, which training and evaluation run."""
        state = [(slot.path, slot.variable.replace(trained[slot.names[0]])) for slot in self.slots]
        return nnx.merge(self.graphdef, nnx.from_flat_state(state), frozen)

    def model(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> nnx.Module:
        """Put trained arrays and frozen state together into the original model. Stacked arrays go to host memory."""
        model = self.merge(trained, frozen)
        model.blocks = as_blocks(model.blocks)
        return model

    def by_block(self, tree: Tree) -> Tree:
        """Divide every stacked array in a pytree, such as a `TrainState`, into one array per block.

        Checkpoints are saved in this form, so that they do not depend on stacking. Only dictionaries with the keys of
        the trained arrays are changed. The state of the optimiser holds such dictionaries, too.
        """

        def apart(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: arrays[name] if len(names) == 1 else jax.tree.map(lambda leaf: leaf[index], arrays[names[0]])  # noqa: B023
                for _, _, names in self.slots
                for index, name in enumerate(names)
            }

        return _map_dicts(apart, tree, {slot.names[0] for slot in self.slots})

    def by_step(self, tree: Tree) -> Tree:
        """Stack the arrays of equal blocks in a pytree again. This is the inverse of `by_block`."""

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
    """Divide an adapted model into its trained arrays and its frozen state.

    Args:
        model: An adapted model with the attribute `blocks`. If blocks are stacked, their arrays are deleted, and this
            model cannot be used afterwards.
        adapter: The adapter of the model. Its attribute `trainable` selects the trained parameters.
        scan_layers: Whether to stack equal neighbouring blocks, so that they are compiled only once. Blocks that
            differ, for example because only some of them are adapted, are not stacked.
        group_of: A function from the path of a trained variable to its group in the optimiser. Blocks are stacked only
            if their variables belong to the same groups.

    Returns:
        A `Partition`, the trained arrays by path, and the frozen state.
    """
    trained = {path for path, _ in nnx.to_flat_state(nnx.state(model, adapter.trainable))}

    def kind_of(path: tuple) -> Hashable:
        return group_of(join(("blocks", *path))) if ("blocks", *path) in trained else False

    runs = runs_of(model.blocks, kind_of) if scan_layers else [1] * len(model.blocks)
    model = nnx.merge(*nnx.split(model))
    model.blocks = as_parts(model.blocks, runs)
    blocks = list(itertools.accumulate(runs, initial=0))

    def paths_of(path: tuple) -> list[tuple]:
        """Return the paths in the original model of a variable in the stacked model."""
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


def cut_before(trained: Iterable[str], model: type[Model], depth: int) -> int:
    """Return the last cut of a model (`Model.before`) before which nothing is trained.

    The result is 0, before the first block, if a parameter outside the blocks is trained that may be used before them.

    Args:
        trained: The paths of the trained parameters in the original model.
        model: The class of the model. If it cannot be cut, the result is 0.
        depth: The number of blocks.

    >>> from surm_jax.models import ViT
    >>> paths = ["head/kernel", "blocks/3/mlp/up/bias"]
    >>> cut_before(paths, ViT, depth=4), cut_before(paths[:1], ViT, depth=4), cut_before(["cls_token"], ViT, depth=4)
    (3, 5, 0)
    """
    if (after_blocks := model.after_blocks) is None:
        return 0

    def cut(path: str) -> int:
        first, _, rest = path.partition("/")
        if first == "blocks":
            return int(rest.partition("/")[0])
        return depth + 1 if first == "head" else depth if first in after_blocks else 0

    return min(map(cut, trained), default=0)


def _map_dicts(fn: Callable[[dict], dict], tree: Tree, keys: set[str]) -> Tree:
    """Apply `fn` to every dictionary in a pytree that has exactly these keys, and return the result as a copy."""
    chosen = lambda node: isinstance(node, dict) and node.keys() == keys  # noqa: E731
    return jax.tree.map(lambda node: fn(node) if chosen(node) else node, tree, is_leaf=chosen)


def _stack(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
