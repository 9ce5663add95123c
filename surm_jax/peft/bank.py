"""Many adapters in one batch: every example names its adapter, and one program serves them all.

A bank stacks the updates of adapters with the same methods, (adapters, ...) for every array. In the product each
example gathers its own: for a circulant one vector of n numbers, whose transform costs as much as that of one more
token.
"""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from surm_jax.errors import UserError
from surm_jax.peft.attach import attach
from surm_jax.peft.context import example_adapters
from surm_jax.peft.delta import Delta
from surm_jax.peft.files import load_adapter
from surm_jax.peft.inject import adapted_modules, base_parameters
from surm_jax.peft.layers import is_linear, matrix_view
from surm_jax.peft.lifecycle import adapter_names
from surm_jax.peft.variables import AdapterConstant, AdapterScale
from surm_jax.structured import Dense, Dot, StructuredMatrix

BANK = "bank"
"""The name under which a bank's updates are attached."""


class BankDelta(nnx.Module):
    """The updates of one layer by all adapters of a bank.

    Args:
      matrices: one for each adapter, all of one structure.
      biases: for each adapter what is added to the layer's bias, (out,); `None`: nothing.
    """

    def __init__(self, matrices: Sequence[StructuredMatrix], biases: Sequence[Array] | None):
        first = matrices[0]
        self.names = tuple(first.arrays())
        self.empty = nnx.static(first.with_arrays(**dict.fromkeys(first.arrays())))
        self.count = len(matrices)
        self.scale = AdapterScale(jnp.ones((), jnp.float32))
        for name in self.names:
            setattr(self, name, AdapterConstant(jnp.stack([matrix.arrays()[name] for matrix in matrices])))
        if biases is not None:
            self.added_bias = AdapterConstant(jnp.stack(biases))

    @property
    def simple(self) -> bool:
        """Never: each example has another matrix."""
        return False

    def stored(self) -> StructuredMatrix:
        """Returns the matrix of the first adapter, of the same family and shape as all others."""
        return self.empty.with_arrays(**{name: getattr(self, name)[0] for name in self.names})

    def tensors(self) -> dict[str, nnx.Variable]:
        """Returns nothing: a bank is not trained, and its adapters are in their folders."""
        return {}

    def change(self, kernel: Array) -> Array:
        """Refuses what needs one kernel for all examples.

        Raises:
          UserError: always.
        """
        raise UserError("each example has another update of a bank, which one kernel cannot hold: merge one adapter")

    def outputs(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        """Returns what each example's adapter adds to the output y, (batch, ..., out)."""
        del kernel, dot
        ids = self._checked(example_adapters(), x.shape[:-1])

        def own(stacked: nnx.Variable) -> Array:
            # Without the fill a number that is none of the bank's would silently get some adapter.
            at = stacked[...].at[ids]
            return at.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

        arrays = {name: own(getattr(self, name)) for name in self.names}
        scale = self.scale[...]
        moved = jax.vmap(lambda x, arrays: self.empty.with_arrays(**arrays).times(scale).apply(x))(x, arrays)
        if hasattr(self, "added_bias"):
            bias = scale * own(self.added_bias)
            moved = moved + bias.reshape(bias.shape[0], *[1] * (moved.ndim - 2), bias.shape[-1]).astype(moved.dtype)
        return moved.astype(y.dtype)

    def _checked(self, ids: Array | None, batch: tuple[int, ...]) -> Array:
        if ids is None:
            raise UserError("which adapter? Call the model within `with surm_jax.adapter_of_examples(ids):`")
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise UserError(f"adapter_of_examples needs whole numbers, the adapters' places, got {ids.dtype}")
        if ids.ndim != 1 or ids.shape != batch[:1]:
            raise UserError(f"adapter_of_examples has ids of shape {ids.shape} for a batch of shape {batch}")
        if not isinstance(ids, jax.core.Tracer) and ids.size and not 0 <= ids.min() <= ids.max() < self.count:
            raise UserError(f"adapter_of_examples has {ids.min()} to {ids.max()}, but the bank 0 to {self.count - 1}")
        return ids


def load_bank(folders: Sequence[str | os.PathLike], model: nnx.Module) -> nnx.Module:
    """Returns a base model that serves the adapters of several folders, each example of a batch its own.

        model = surm_jax.load_bank(["adapters/anna", "adapters/bert"], base)
        with surm_jax.adapter_of_examples(jnp.array([0, 1, 1, 0])):
            logits = model(images)

    Layers that only some adapters update are served too. Of parameters trained besides, linear layers such as the head
    are each example's own as well.

    Args:
      folders: adapters of this base, of the same methods; example i gets the adapter `folders[ids[i]]`. In a compiled
        function, where numbers are not known, one that is none of theirs gives NaN.
      model: the base model, without adapters.

    Raises:
      UserError: if a folder cannot be loaded (`load_adapter`), or has branches or DoRA, or updates of another structure
        than the first, or trained something else than linear layers; or if the model has adapters.
    """
    if isinstance(folders, str | os.PathLike):
        raise UserError(f"folders must be a list, got one: write [{str(folders)!r}]")
    if names := adapter_names(model):
        raise UserError(f"a bank needs a base model without adapters, and this one has {', '.join(names)}")
    if not folders:
        raise UserError("load_bank needs at least one adapter folder")
    matrices: list[dict[str, StructuredMatrix]] = []
    biases: list[dict[str, Array]] = []
    for folder in folders:
        loaded, _ = load_adapter(folder, model)
        found, added = _trained_layers(model, loaded, folder)
        for path, _, part, _ in adapted_modules(loaded):
            if not isinstance(part, Delta) or part.normalized:
                raise UserError(f"{folder}: {path} has no plain update, and only those can be served together")
            if path in found:
                raise UserError(f"{folder}: {path} was trained and updated, and only one of both can be served")
            found[path] = part.matrix()
        matrices.append(found)
        biases.append(added)
    result = nnx.clone(model)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(result)}
    for path in sorted({path for found in matrices for path in found}):
        like = next(found[path] for found in matrices if path in found)
        rows = [found.get(path, like.times(0.0)) for found in matrices]
        for folder, row in zip(folders, rows, strict=True):
            if jax.tree.structure(row) != jax.tree.structure(like) or _shapes(row) != _shapes(like):
                raise UserError(f"{folder}: {path} has {row!r}, but another adapter of the bank {like!r}")
        added = [found[path] for found in biases if path in found]
        if added:
            added = [found.get(path, jnp.zeros_like(added[0])) for found in biases]
        attach(modules[path], BANK, BankDelta(rows, added or None))
    return result


def _trained_layers(
    base: nnx.Module, loaded: nnx.Module, folder: str | os.PathLike
) -> tuple[dict[str, StructuredMatrix], dict[str, Array]]:
    """Returns the change of every linear layer that was trained itself: of its kernel, and of its bias."""
    before, after = base_parameters(base), base_parameters(loaded)
    changed = [path for path, variable in after.items() if variable.get_value() is not before[path].get_value()]
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(base)}
    kernels, biases = {}, {}
    for path in changed:
        layer, _, name = path.rpartition("/")
        if not is_linear(modules.get(layer)) or name not in ("kernel", "bias"):
            raise UserError(f"{folder}: {path} was trained, and only linear layers can be served together")
        shape = matrix_view(modules[layer], layer).shape
        change = after[path][...].astype(jnp.float32) - before[path][...].astype(jnp.float32)
        if name == "kernel":
            kernels[layer] = Dense(change.reshape(shape))
        else:
            biases[layer] = change.reshape(shape[1])
            kernels.setdefault(layer, Dense(jnp.zeros(shape, jnp.float32)))
    return kernels, biases


def _shapes(matrix: StructuredMatrix) -> list[tuple[int, ...]]:
    return [array.shape for array in matrix.arrays().values()]
