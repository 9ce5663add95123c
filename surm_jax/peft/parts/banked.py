"""Parts that hold many adapters and apply a different one to each example of a batch.

The arrays of all adapters are stacked to the shape (adapters, ...), and those of each example's adapter are gathered.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from surm_jax.errors import UserError
from surm_jax.peft.parts.base import AdapterConstant, KernelPart, OutputPart, Part
from surm_jax.peft.parts.dropout import adapter_dropout
from surm_jax.structured import Dense, Dot

_EXAMPLES: contextvars.ContextVar[Array | None] = contextvars.ContextVar("adapter_of_examples", default=None)


@contextlib.contextmanager
def adapter_of_examples(ids: Int[Array, "batch"]) -> Iterator[None]:
    """Choose the adapter of each example: within the block, example i of a batch uses adapter `ids[i]` of a bank.

    Use the block inside the compiled function, and pass `ids` to that function as an argument. If the block surrounds
    the call of a compiled function, the `ids` of the first call become constants of the compiled program.
    """
    token = _EXAMPLES.set(ids)
    try:
        yield
    finally:
        _EXAMPLES.reset(token)


def example_adapters() -> Int[Array, "batch"] | None:
    """Return the `ids` of the surrounding `adapter_of_examples` block, or `None` outside of such a block."""
    return _EXAMPLES.get()


class _Stack(nnx.Module):
    """Several parts of equal structure, stored as one part with stacked arrays.

    Args:
        parts: One part for each adapter. They may differ only in the values of their arrays.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        graphdef, state = nnx.split(parts[0])
        self.like, self.structure = nnx.static(graphdef), nnx.static(jax.tree.structure(state))
        rows = zip(*(jax.tree.leaves(nnx.state(part)) for part in parts), strict=True)
        self.arrays = nnx.List([AdapterConstant(jnp.stack(row)) for row in rows])

    def one(self, arrays: Sequence[Array]) -> Any:
        """Return a part with these arrays, one for each leaf of its state."""
        return nnx.merge(self.like, jax.tree.unflatten(self.structure, arrays))

    def first(self) -> Any:
        """Return the part of the first adapter."""
        return self.one([stacked[0] for stacked in self.arrays])

    def own(self, ids: Int[Array, "batch"]) -> list[Array]:
        """Return the arrays of a part for each example, gathered from its adapter to the shape (batch, ...)."""
        return [_own(stacked, ids) for stacked in self.arrays]


class BankedKernelPart(KernelPart):
    """What all adapters of a bank add to the product of one linear layer.

    Each example gets what its own adapter's part adds. If the adapter also trained the layer's kernel or bias, the
    change of these is added too.

    Args:
        count: The number of adapters.
        shape: The layer's (in_features, out_features).
        parts: One part for each adapter, all with equal structure. `None` means that no adapter has a part in this
            layer.
        kernels: For each adapter, the difference between its kernel and that of the base model, of shape (in, out).
            `None` means that no adapter trained the kernel.
        biases: For each adapter, the difference between its bias and that of the base model, of shape (out,). `None`
            means that no adapter trained the bias.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, int],
        *,
        parts: Sequence[Part] | None = None,
        kernels: Sequence[Float[Array, "in out"]] | None = None,
        biases: Sequence[Float[Array, "out"]] | None = None,
    ) -> None:
        super().__init__()
        self.count, self.sizes = count, shape
        if parts is not None:
            self.parts = _Stack(parts)
        if kernels is not None:
            self.kernels = AdapterConstant(jnp.stack(kernels))
        if biases is not None:
            self.biases = AdapterConstant(jnp.stack(biases))

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's (in_features, out_features)."""
        return self.sizes

    @property
    def kind(self) -> str:
        """What tables call the parts (see `Part.kind`), or "Dense" if this layer has changes of the kernel only."""
        return self.parts.first().kind if hasattr(self, "parts") else "Dense"

    def tensors(self) -> dict[str, nnx.Variable]:
        """Return an empty dictionary, because a bank is never saved: its adapters are in their own folders."""
        return {}

    def _change(self, kernel: Array) -> Array:
        raise UserError("is a bank, in which each example has another update, so that no single kernel can hold them")

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Float[Array, "batch ... out"]:
        ids = _adapters_of(x.shape[:-1], self.count)
        y = y.astype(jnp.float32)
        terms, change = [], _own(self.kernels, ids) if hasattr(self, "kernels") else None
        if change is not None:
            terms.append(jax.vmap(lambda x, change: Dense(change).apply(x))(x, change).astype(jnp.float32))
            y = y + terms[0]
        if hasattr(self, "parts"):

            def added(x: Array, y: Array, change: Array | None, own: Sequence[Array]) -> Array:
                # If the kernel was trained, each example has its own kernel, and its part may read it.
                mine = kernel if change is None else kernel.astype(jnp.float32) + change
                return self.parts.one(own).added(x, y, mine, dot)

            terms.append(_without_dropout(jax.vmap(added), x, y, change, self.parts.own(ids)))
        if hasattr(self, "biases"):
            rows = _own(self.biases, ids)
            terms.append(rows.reshape(rows.shape[0], *[1] * (y.ndim - 2), rows.shape[1]))
        return functools.reduce(jnp.add, terms)


class BankedOutputPart(OutputPart):
    """What all adapters of a bank add to the output of one module.

    Args:
        parts: One part for each adapter, all with equal structure.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.count, self.parts = len(parts), _Stack(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """The (in_features, out_features) of the parts, which are the same for all adapters."""
        return self.parts.first().shape

    @property
    def kind(self) -> str:
        """What tables call the parts, which are of one kind for all adapters (see `Part.kind`)."""
        return self.parts.first().kind

    def tensors(self) -> dict[str, nnx.Variable]:
        """Return an empty dictionary, because a bank is never saved: its adapters are in their own folders."""
        return {}

    def _added(self, y: Array) -> Float[Array, "batch ... d"]:
        ids = _adapters_of(y.shape[:-1], self.count)
        return _without_dropout(jax.vmap(lambda y, own: self.parts.one(own).added(y)), y, self.parts.own(ids))


def _without_dropout(function: Callable[..., Array], *arguments: Any) -> Array:
    with adapter_dropout(None):
        return function(*arguments)


def _own(stacked: nnx.Variable, ids: Int[Array, "batch"]) -> Array:
    """Gather the values of each example's adapter: from (adapters, ...) to (batch, ...)."""
    # An id outside of the bank gives NaN. Without the fill value, it would silently get another adapter.
    return stacked[...].at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _adapters_of(batch: tuple[int, ...], count: int) -> Int[Array, "batch"]:
    """Return the index of each example's adapter, after checking it against the batch and the size of the bank.

    Raises:
        UserError: If no `adapter_of_examples` block surrounds the call, or if its `ids` do not fit the batch and bank.
    """
    given = example_adapters()
    if given is None:
        raise UserError("no adapters were chosen: call the model within `with surm_jax.adapter_of_examples(ids):`")
    ids = jnp.asarray(given)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"adapter_of_examples needs whole numbers, the indices of adapters, got {ids.dtype}")
    if ids.ndim != 1 or ids.shape != batch[:1]:
        raise UserError(f"adapter_of_examples has ids of shape {ids.shape} for a batch of shape {batch}")
    if not isinstance(ids, jax.core.Tracer) and ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise UserError(f"adapter_of_examples has ids from {ids.min()} to {ids.max()}, but the bank 0 to {count - 1}")
    return ids
