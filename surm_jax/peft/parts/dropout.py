"""Dropout of adapters. Models do not pass a key for it to their layers, so the key is set for a block of code.

Set the key inside the function that is differentiated and compiled:

    def loss(trainable, frozen, batch, key):
        model = nnx.merge(graphdef, trainable, frozen, copy=True)
        with surm_jax.adapter_dropout(key):
            logits = model(batch["image"])

The key is read while JAX traces the block, so a block around a call of an already compiled function has no effect. If
JAX traces a function once for several calls, such as a method under `nnx.remat` or `nnx.jit` in your own model, all
calls drop the same entries. To avoid this, apply `nnx.remat` or `nnx.jit` to a new function object for each call.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jaxtyping import Array


class _Keys:
    """A JAX key, and the number of dropout keys that were drawn from it so far."""

    def __init__(self, key: jax.Array) -> None:
        self.key = key
        self.drawn: int | Array = 0

    def __call__(self) -> jax.Array:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn)


_KEYS: contextvars.ContextVar[_Keys | None] = contextvars.ContextVar("adapter_dropout", default=None)


@contextlib.contextmanager
def adapter_dropout(key: jax.Array | None) -> Iterator[None]:
    """Switch on the dropout of adapters within the block.

    Args:
        key: A JAX key, from which the layers draw their dropout keys in the order of their calls. `None` means that
            there is no dropout, as outside of the block.
    """
    token = _KEYS.set(None if key is None else _Keys(key))
    try:
        yield
    finally:
        _KEYS.reset(token)


def dropout_key() -> jax.Array | None:
    """Return a new dropout key, or `None` outside of an `adapter_dropout` block with a key."""
    keys = _KEYS.get()
    return None if keys is None else keys()


def keys_drawn() -> int | Array | None:
    """Return how many dropout keys were drawn so far in the `adapter_dropout` block, or `None` outside of it.

    Code that is traced once and run several times, such as the body of a scan, should pass this number from one run to
    the next, and begin each run with `set_keys_drawn`. Each run then draws the same keys as in a Python loop.
    """
    keys = _KEYS.get()
    return None if keys is None else keys.drawn


def set_keys_drawn(count: int | Array | None) -> None:
    """Set the number of dropout keys drawn so far, which determines the next keys of the `adapter_dropout` block.

    If `count` is `None`, or outside of such a block, this function does nothing.

    Args:
        count: A number that `keys_drawn` returned.
    """
    keys = _KEYS.get()
    if count is not None and keys is not None:
        keys.drawn = count


def drops() -> bool:
    """Return whether adapters use dropout, which they do within an `adapter_dropout` block with a key."""
    return _KEYS.get() is not None


def drop(x: Array, rate: float) -> Array:
    """Return x with entries set to 0 with probability `rate`, and the other entries multiplied by `1 / (1 - rate)`.

    If the dropout of adapters is off, or the rate is 0, x is returned unchanged.

    Args:
        x: The input of an adapter's part.
        rate: The dropout rate.
    """
    key = dropout_key() if rate else None
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jax.numpy.where(keep, x / (1 - rate), jax.numpy.zeros((), x.dtype))
