"""What adapters need of a call and models do not pass on: a key for their dropout, and the adapter of each example.

Both are given for a block of code, inside the function that is differentiated and compiled:

    def loss(trainable, frozen, batch, key):
        model = nnx.merge(graphdef, trainable, frozen)
        with surm_jax.adapter_dropout(key):
            logits = model(batch["image"])

They are read while JAX traces the block: around a call of a function that is compiled already they change nothing. A
function that JAX traces once for several calls, such as a method under `nnx.remat` or `nnx.jit` in a model of your own,
counts as compiled: what it read in the first call, it has in all. Wrap a new function for each call there.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jaxtyping import Array, Int


class _Keys:
    """A key, and how many have been drawn from it."""

    def __init__(self, key: jax.Array) -> None:
        self.key, self.drawn = key, 0

    def __call__(self) -> jax.Array:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn)


_KEYS: contextvars.ContextVar[_Keys | None] = contextvars.ContextVar("adapter_dropout", default=None)
_EXAMPLES: contextvars.ContextVar[Array | None] = contextvars.ContextVar("adapter_of_examples", default=None)


@contextlib.contextmanager
def adapter_dropout(key: jax.Array | None) -> Iterator[None]:
    """Within the block, adapters with dropout drop: each layer draws from `key` in the order of the calls.

    To be used inside the compiled function. A model whose own blocks are under `nnx.remat` or `nnx.jit` is traced once
    for all of them, and they would drop alike.

    Args:
        key: a JAX key; `None` means no dropout, as without the block.
    """
    token = _KEYS.set(None if key is None else _Keys(key))
    try:
        yield
    finally:
        _KEYS.reset(token)


@contextlib.contextmanager
def adapter_of_examples(ids: Int[Array, "batch"]) -> Iterator[None]:
    """Within the block, example i of the batch has the adapter number `ids[i]` of a bank (`surm_jax.peft.bank`).

    To be used inside the compiled function, which gets `ids` as an argument: around a compiled one, the first `ids`
    would be constants of its program.
    """
    token = _EXAMPLES.set(ids)
    try:
        yield
    finally:
        _EXAMPLES.reset(token)


def dropout_key() -> jax.Array | None:
    """Returns a fresh key, or `None` outside of `adapter_dropout`."""
    keys = _KEYS.get()
    return None if keys is None else keys()


def keys_drawn() -> int | Array | None:
    """Returns how many keys have been drawn within `adapter_dropout`, or `None` outside of it.

    Code that is traced once and run several times, such as the body of a scan, hands this number from one time to the
    next, and begins each with `set_keys_drawn`: then every time draws keys of its own, those that a loop would draw.
    """
    keys = _KEYS.get()
    return None if keys is None else keys.drawn


def set_keys_drawn(count: int | Array | None) -> None:
    """Goes on as after so many keys; `None` outside of `adapter_dropout`."""
    if count is not None:
        _KEYS.get().drawn = count


def drops() -> bool:
    """Whether adapters with dropout drop now."""
    return _KEYS.get() is not None


def example_adapters() -> Int[Array, "batch"] | None:
    """Returns the numbers given by `adapter_of_examples`, or `None` outside of it."""
    return _EXAMPLES.get()


def drop(x: Array, rate: float) -> Array:
    """Dropout of an adapter's input: zeroes entries with probability `rate`, scales the others by `1 / (1 - rate)`."""
    key = dropout_key() if rate else None
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jax.numpy.where(keep, x / (1 - rate), jax.numpy.zeros((), x.dtype))
