"""A model in two parts: what is trained, as arrays by path, and what is frozen.

Only the trained part meets `jax.grad`, optax and checkpoints. The frozen part goes into `jit` as an argument.
"""

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx

from surm_jax.paths import join
from surm_jax.peft import Adapter

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Partition:
    """How the trained arrays and the frozen state make a model again.

    Attributes:
      graphdef: the model's structure.
      slots: the trained variables, abstract, by their NNX paths.
    """

    graphdef: nnx.GraphDef
    slots: tuple[tuple[tuple, nnx.Variable], ...]

    def merge(self, trained: Mapping[str, jax.Array], frozen: nnx.State) -> nnx.Module:
        """Returns the model with these arrays."""
        state = nnx.from_flat_state([(path, slot.replace(trained[join(path)])) for path, slot in self.slots])
        return nnx.merge(self.graphdef, state, frozen)


def partition(model: nnx.Module, adapter: Adapter) -> tuple[Partition, Arrays, nnx.State]:
    """Splits an adapted model once.

    Returns:
      The partition, the trained arrays by path, and the frozen state.
    """
    graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)
    flat = nnx.to_flat_state(trained)
    slots = tuple((path, nnx.as_abstract(variable)) for path, variable in flat)
    return Partition(graphdef, slots), {join(path): variable[...] for path, variable in flat}, frozen
