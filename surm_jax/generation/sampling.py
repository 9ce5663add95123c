"""Choose the next token from logits: the most probable one, or a random one."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from surm_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The three steps have the order and the meaning that they have in transformers.

    Attributes:
        temperature: The number that logits are divided by. 0: the most probable token is chosen (greedy decoding), and
            the other fields have no effect.
        top_k: Only the tokens with the `top_k` largest logits are possible. 0: all are.
        top_p: Of these, only the most probable tokens are possible, as many as are needed for a total probability of
            `top_p`.

    Raises:
        UserError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be a finite number of at least 0, got {self.temperature!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise UserError(f"top_k must be an integer of at least 0, got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def choose(logits: Float[Array, "b v"], sampling: Sampling, keys: Key[Array, "b"]) -> Int[Array, "b"]:
    """Return a token for every row of logits.

    Args:
        logits: The logits of the next token.
        sampling: How to choose.
        keys: A random key for each row. So a row is drawn equally, whatever the other rows are.

    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> choose(jnp.array([[0.0, 3.0, 1.0]]), Sampling(), keys).tolist()
    [1]
    """
    if not sampling.temperature:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, possible(logits, sampling)).astype(jnp.int32)


def possible(logits: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """Return logits divided by the temperature, and -inf for the tokens that `top_k` and `top_p` exclude.

    >>> possible(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), Sampling(temperature=1.0, top_p=0.6))[0, 2].item()
    -inf
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
        least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
