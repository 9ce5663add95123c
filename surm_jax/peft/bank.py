"""Many adapters in one batch: every example names its adapter, and one program serves them all.

A bank stacks the updates and branches of adapters with the same methods, (adapters, ...) for every array. In the
product each example gathers its own: for a circulant one vector of n numbers, whose transform costs as much as that of
one more token.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from surm_jax.errors import UserError
from surm_jax.paths import join
from surm_jax.peft.adapt import adapted_modules, base_parameters
from surm_jax.peft.files import read_adapter
from surm_jax.peft.fingerprint import check_fingerprint, fingerprint
from surm_jax.peft.kernels import check_call, is_linear, matrix_view
from surm_jax.peft.lifecycle import adapter_names
from surm_jax.peft.parts.attach import attach
from surm_jax.peft.parts.branch import Branch
from surm_jax.peft.parts.context import example_adapters
from surm_jax.peft.parts.variables import AdapterConstant, AdapterScale
from surm_jax.structured import Dense, Dot, LowRank, StructuredMatrix, Sum

T = TypeVar("T")

BANK = "bank"
"""The name under which a bank's updates and branches are attached."""


class BankDelta(nnx.Module):
    """The updates of one layer by all adapters of a bank.

    Args:
        matrices: one for each adapter, all of one structure.
        gains: for each adapter what the columns of the kernel with its update are multiplied with (DoRA), (out,);
            `None`: nothing.
        biases: for each adapter what is added to the layer's bias, (out,); `None`: nothing.
    """

    def __init__(
        self, matrices: Sequence[StructuredMatrix], gains: Sequence[Array] | None, biases: Sequence[Array] | None
    ) -> None:
        first = matrices[0]
        self.names = tuple(first.arrays())
        self.empty = nnx.static(first.with_arrays(**dict.fromkeys(first.arrays())))
        self.count = len(matrices)
        self.scale = AdapterScale(jnp.ones((), jnp.float32))
        for name in self.names:
            setattr(self, name, AdapterConstant(jnp.stack([matrix.arrays()[name] for matrix in matrices])))
        if gains is not None:
            self.gain = AdapterConstant(jnp.stack(gains))
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
        ids = _adapters_of(x.shape[:-1], self.count)
        arrays = {name: _own(getattr(self, name), ids) for name in self.names}
        moved = jax.vmap(lambda x, arrays: self.empty.with_arrays(**arrays).apply(x))(x, arrays).astype(jnp.float32)
        if hasattr(self, "gain"):
            frozen = y.astype(jnp.float32)
            moved = _features(_own(self.gain, ids), y.ndim) * (frozen + moved) - frozen
        if hasattr(self, "added_bias"):
            moved = moved + _features(_own(self.added_bias, ids), y.ndim)
        return (self.scale[...] * moved).astype(y.dtype)


class BankBranch(Branch):
    """The branches of one module by all adapters of a bank.

    Args:
        branches: one for each adapter, which differ in their numbers alone.
    """

    def __init__(self, branches: Sequence[Branch]) -> None:
        graphdef, state = nnx.split(branches[0])
        self.like, self.structure = nnx.static(graphdef), nnx.static(jax.tree.structure(state))
        self.count = len(branches)
        self.scale = AdapterScale(jnp.ones((), jnp.float32))
        arrays = zip(*(jax.tree.leaves(nnx.state(branch)) for branch in branches), strict=True)
        self.arrays = nnx.List([AdapterConstant(jnp.stack(rows)) for rows in arrays])

    def matrices(self) -> tuple[StructuredMatrix, ...]:
        """Returns those of the first adapter, of the same families and shapes as all others."""
        return self._one([stacked[0] for stacked in self.arrays]).matrices()

    def tensors(self) -> dict[str, nnx.Variable]:
        """Returns nothing: a bank is not trained, and its adapters are in their folders."""
        return {}

    def __call__(self, x: Array) -> Array:
        """Returns what each example's adapter adds to x, (batch, ..., d)."""
        ids = _adapters_of(x.shape[:-1], self.count)
        own = [_own(stacked, ids) for stacked in self.arrays]
        moved = jax.vmap(lambda x, arrays: self._one(arrays)(x))(x, own)
        return moved * self.scale[...].astype(moved.dtype)

    def _one(self, arrays: Sequence[Array]) -> Branch:
        return nnx.merge(self.like, jax.tree.unflatten(self.structure, arrays))


def _own(stacked: nnx.Variable, ids: Int[Array, "batch"]) -> Array:
    """Returns each example's part of an array of all adapters, (adapters, ...)."""
    # Without the fill a number that is none of the bank's would silently get some adapter.
    return stacked[...].at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _features(rows: Float[Array, "batch out"], ndim: int) -> Float[Array, "batch ... out"]:
    """Returns a row for every example, to be multiplied with or added to an output of so many axes."""
    return rows.reshape(rows.shape[0], *[1] * (ndim - 2), rows.shape[1])


def _adapters_of(batch: tuple[int, ...], count: int) -> Int[Array, "batch"]:
    """Returns the number of each example's adapter in a bank of so many."""
    ids = example_adapters()
    if ids is None:
        raise UserError("which adapter? Call the model within `with surm_jax.adapter_of_examples(ids):`")
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"adapter_of_examples needs whole numbers, the adapters' places, got {ids.dtype}")
    if ids.ndim != 1 or ids.shape != batch[:1]:
        raise UserError(f"adapter_of_examples has ids of shape {ids.shape} for a batch of shape {batch}")
    if not isinstance(ids, jax.core.Tracer) and ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise UserError(f"adapter_of_examples has {ids.min()} to {ids.max()}, but the bank 0 to {count - 1}")
    return ids


def load_bank(folders: Sequence[str | os.PathLike], model: nnx.Module) -> nnx.Module:
    """Returns a base model that serves the adapters of several folders, each example of a batch its own.

        model = surm_jax.load_bank(["adapters/anna", "adapters/bert"], base)
        with surm_jax.adapter_of_examples(jnp.array([0, 1, 1, 0])):
            logits = model(images)

    Modules that only some adapters change are served too. Of parameters trained besides, kernels and biases of linear
    layers such as the head are each example's own as well. Nothing drops.

    Args:
        folders: adapters of this base, of the same methods; example i gets the adapter `folders[ids[i]]`. In a compiled
            function, where numbers are not known, one that is none of theirs gives NaN.
        model: the base model, without adapters.

    Raises:
        UserError: if a folder cannot be loaded (`load_adapter`), or has updates or branches of another structure than
            the first, or trained something else than linear layers, or such whose `__call__` goes past `super()`; or if
            the model has adapters.
    """
    if isinstance(folders, str | os.PathLike):
        raise UserError(f"folders must be a list, got one: write [{str(folders)!r}]")
    if names := adapter_names(model):
        raise UserError(f"a bank needs a base model without adapters, and this one has {', '.join(names)}")
    if not folders:
        raise UserError("load_bank needs at least one adapter folder")
    base = fingerprint(nnx.state(model))  # Once: it reads all weights.
    kernels, gains, biases, branches = zip(*(_changes(model, base, folder) for folder in folders), strict=True)
    result = nnx.clone(model)
    modules = {join(path): module for path, module in nnx.iter_modules(result)}
    for path in sorted({path for found in (*kernels, *biases) for path in found}):
        check_call(modules[path], path, "delta")
        m, n = matrix_view(modules[path], path).shape
        nothing = LowRank(down=jnp.zeros((m, 1), jnp.float32), up=jnp.zeros((1, n), jnp.float32))
        matrices = _rows(path, kernels, lambda matrix: matrix.absorb(0.0)) or [nothing] * len(folders)
        _require_alike(path, folders, matrices)
        delta = BankDelta(matrices, _rows(path, gains, jnp.ones_like), _rows(path, biases, jnp.zeros_like))
        attach(modules[path], BANK, delta)
    for path in sorted({path for found in branches for path in found}):
        parts = _rows(path, branches, _switched_off)
        _require_alike(path, folders, parts)
        attach(modules[path], BANK, BankBranch(parts))
    return result


def _rows(path: str, tables: Sequence[Mapping[str, T]], nothing: Callable[[T], T]) -> list[T] | None:
    """Returns what each adapter has at a path, made `nothing` of another's where it has none; `None` if none has."""
    there = [table[path] for table in tables if path in table]
    return [table[path] if path in table else nothing(there[0]) for table in tables] if there else None


def _switched_off(branch: Branch) -> Branch:
    branch = nnx.clone(branch)
    branch.scale[...] = jnp.zeros((), jnp.float32)
    return branch


def _changes(
    model: nnx.Module, base: Mapping[str, str], folder: str | os.PathLike
) -> tuple[dict[str, StructuredMatrix], dict[str, Array], dict[str, Array], dict[str, Branch]]:
    """Returns what the adapter of a folder brings, by path: changes of kernels, gains, changes of biases, branches."""
    loaded, adapter, expected = read_adapter(folder, model)
    _, _, frozen = nnx.split(loaded, adapter.trainable, ...)
    paths = {join(path) for path, _ in nnx.to_flat_state(frozen)}
    check_fingerprint({path: base[path] for path in base.keys() & paths}, expected, f"the adapter {folder}")
    kernels, biases = _trained_layers(model, loaded, folder)
    gains, branches = {}, {}
    for path, _, part, layer in adapted_modules(loaded):
        if isinstance(part, Branch):
            part.dropout = 0.0
            branches[path] = part
            continue
        matrix = part.matrix()
        if part.normalized:
            gains[path] = part.gain(layer.kernel[...].reshape(matrix.shape), matrix.to_dense())
        kernels[path] = Sum([kernels[path], matrix]) if path in kernels else matrix
    return kernels, gains, biases, branches


def _require_alike(
    path: str,
    folders: Sequence[str | os.PathLike],
    parts: Sequence[StructuredMatrix | Branch],
) -> None:
    """Checks that what adapters have at a path differs in numbers alone."""
    for folder, part in zip(folders, parts, strict=True):
        if _form(part) != _form(parts[0]):
            raise UserError(f"{folder}: {path} has {_text(part)}, but another adapter of the bank {_text(parts[0])}")


def _form(part: StructuredMatrix | Branch) -> tuple[Any, ...]:
    structure, arrays = nnx.split(part) if isinstance(part, Branch) else (jax.tree.structure(part), part)
    return structure, [array.shape for array in jax.tree.leaves(arrays)]


def _text(part: StructuredMatrix | Branch) -> str:
    if not isinstance(part, Branch):
        return repr(part)
    return f"a branch of {' and '.join(map(repr, part.matrices()))}, activation={part.activation}, alpha={part.alpha}"


def _trained_layers(
    base: nnx.Module, loaded: nnx.Module, folder: str | os.PathLike
) -> tuple[dict[str, StructuredMatrix], dict[str, Array]]:
    """Returns the change of every linear layer that was trained itself: of its kernel, and of its bias."""
    before, after = base_parameters(base), base_parameters(loaded)
    changed = [path for path, variable in after.items() if variable.get_value() is not before[path].get_value()]
    modules = {join(path): module for path, module in nnx.iter_modules(base)}
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
    return kernels, biases
