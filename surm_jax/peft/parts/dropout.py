"""Dropout of adapters: models do not pass a key for it on, so it is given for a block of code.

Use the block inside the function that is differentiated and compiled:

    def loss(trainable, frozen, batch, key):
        model = nnx.merge(graphdef, trainable, frozen)
        with surm_jax.adapter_dropout(key):
            logits = model(batch["image"])

The key is read while JAX traces the block: around a call of a function that is compiled already, the block has no
effect. A function that JAX traces once for several calls, such as a method under `nnx.remat` or `nnx.jit` in your own
model, draws the same numbers in all of them. Wrap a new function for each call there.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jaxtyping import Array


class _Keys:
    """A key, and how many have been drawn from it."""

    def __init__(self, key: jax.Array) -> None:
        self.key = key
        self.drawn: int | Array = 0

    def __call__(self) -> jax.Array:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn)


_KEYS: contextvars.ContextVar[_Keys | None] = contextvars.ContextVar("adapter_dropout", default=None)


@contextlib.contextmanager
def adapter_dropout(key: jax.Array | None) -> Iterator[None]:
    """Let adapters with dropout drop within the block: each layer draws from `key`, in the order of the calls.

    Args:
        key: A JAX key; `None` means no dropout, as without the block.
    """
    token = _KEYS.set(None if key is None else _Keys(key))
    try:
        yield
    finally:
        _KEYS.reset(token)


def dropout_key() -> jax.Array | None:
    """Return a fresh key, or `None` outside of `adapter_dropout`."""
    keys = _KEYS.get()
    return None if keys is None else keys()


def keys_drawn() -> int | Array | None:
    """Return how many keys have been drawn within `adapter_dropout`, or `None` outside of it.

    Code that is traced once and run several times, such as the body of a scan, hands this number from one run to the
    next, and begins each run with `set_keys_drawn`. Every run then draws its own keys, the ones that a loop would draw.
    """
    keys = _KEYS.get()
    return None if keys is None else keys.drawn


def set_keys_drawn(count: int | Array | None) -> None:
    """Continue as if `count` keys had been drawn; `None`, outside of `adapter_dropout`, does nothing."""
    keys = _KEYS.get()
    if count is not None and keys is not None:
        keys.drawn = count


def drops() -> bool:
    """Say whether adapters with dropout drop now."""
    return _KEYS.get() is not None


def drop(x: Array, rate: float) -> Array:
    """Zero entries of an adapter's input with probability `rate`, and scale the others by `1 / (1 - rate)`."""
    key = dropout_key() if rate else None
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jax.numpy.where(keep, x / (1 - rate), jax.numpy.zeros((), x.dtype))
