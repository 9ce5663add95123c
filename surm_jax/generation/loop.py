"""Continue texts token by token: one pass over the prompts, and then a compiled loop with a cache of keys and values.

Prompts of similar length share a batch. They are padded at the left to a common length, so that all rows write their
next token into the same slot of the cache. There is one compilation for each of these lengths.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from surm_jax.errors import UserError
from surm_jax.generation.sampling import Sampling, choose
from surm_jax.models import Decoder
from surm_jax.models.decoder import Cache
from surm_jax.peft import adapter_of_examples

Stop = Callable[[int, list[int]], bool]
"""A function that gets the index of a prompt and its new tokens, and returns whether the text ends with the last."""

_AT_ONCE = 16  # The number of tokens that are written before `Stop` looks at them, if nobody watches.
_SHORTEST = 16


class Answer(NamedTuple):
    """The continuation of one prompt.

    Attributes:
        tokens: The new tokens, without the token that ends a text.
        finish: Why it ends: "end" after a token that ends a text, "stop" if the function `stop` ended it, and "length"
            if it has the largest number of tokens.
    """

    tokens: list[int]
    finish: Literal["end", "stop", "length"]


class _Written(NamedTuple):
    """What the loop carries: the new tokens and their number, the logits after them, which rows end, and the cache."""

    tokens: Int[Array, "b n"]
    steps: Int[Array, ""]
    logits: Array
    done: Bool[Array, "b"]
    cache: Cache


class _Batch(NamedTuple):
    """A batch of padded prompts, with what belongs to each row, and the tokens that end a text."""

    tokens: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    keys: Key[Array, "b"]
    adapters: Int[Array, "b"] | None
    ends: Int[Array, "e"]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]] | Int[np.ndarray, "b t"],
    *,
    max_new_tokens: int,
    mask: Bool[np.ndarray, "b t"] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - It is immutable.
    end_tokens: Sequence[int] | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    adapters: Sequence[int] | None = None,
    batch_size: int = 8,
    watch: Callable[[int, list[int]], None] | None = None,
) -> list[Answer]:
    """Continue every prompt, and return the continuations in the order of the prompts.

    A continuation depends only on its own prompt, the place of this prompt in the list and the seed, up to rounding.

    >>> from surm_jax.models import DecoderConfig
    >>> model = Decoder(DecoderConfig.from_variant("decoder-mini", depth=1), rngs=nnx.Rngs(0))
    >>> answers = generate(model, [[1, 5], [1, 7, 8]], max_new_tokens=4)
    >>> [len(answer.tokens) for answer in answers], answers[0].finish
    ([4, 4], 'length')

    Args:
        model: The model, with or without adapters.
        prompts: The tokens of each prompt, or an array with padding at any side.
        max_new_tokens: The largest number of new tokens.
        mask: For an array, False where a token is padding.
        sampling: How the next token is chosen.
        end_tokens: The tokens that end a text. None: those in the configuration of the model.
        stop: A function that ends a text. It is asked after every new token.
        seed: The seed of random choices.
        adapters: For a bank (`surm_jax.load_bank`), the index of the adapter for each prompt.
        batch_size: The number of prompts that are continued at once.
        watch: A function `(index of the prompt, new tokens)`, which is called with every new token as it is written.

    Raises:
        UserError: A prompt is empty, holds a token that the model does not know, or leaves no room for the new tokens,
            or an argument is out of range.
    """
    rows = _rows(prompts, mask)
    _check(model, rows, max_new_tokens, batch_size, adapters)
    if not rows:
        return []
    ends = np.asarray(model.config.end_tokens if end_tokens is None else end_tokens, np.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(rows)))
    answers: dict[int, Answer] = {}
    graphdef, state = nnx.split(model)
    for length, indices in _batches(rows, batch_size, model.config.max_tokens - max_new_tokens):
        # Copies of the last row fill the batch, so that every batch has the same shape.
        chosen = np.array([*indices, *indices[-1:] * (batch_size - len(indices))])
        tokens, segments = np.zeros((2, batch_size, length), np.int32)
        for place, index in enumerate(chosen):
            tokens[place, length - len(rows[index]) :] = rows[index]
            segments[place, length - len(rows[index]) :] = 1
        own = None if adapters is None else jnp.asarray(np.asarray(adapters)[chosen], jnp.int32)
        batch = _Batch(jnp.asarray(tokens), jnp.asarray(segments), keys[chosen], own, jnp.asarray(ends))
        answers |= _answers(graphdef, state, batch, indices, sampling, max_new_tokens, stop, watch)
    return [answers[index] for index in range(len(rows))]


def _rows(prompts: Any, mask: Any) -> list[np.ndarray]:
    if mask is not None and np.shape(mask) != np.shape(prompts):
        raise UserError(f"mask must have the shape of the prompts, {np.shape(prompts)}, got {np.shape(mask)}")
    rows = [np.asarray(prompt) for prompt in prompts]
    return rows if mask is None else [row[np.asarray(kept, bool)] for row, kept in zip(rows, mask, strict=True)]


def _check(model: Decoder, rows: list[np.ndarray], new: int, batch_size: int, adapters: Sequence[int] | None) -> None:
    if not isinstance(model, Decoder):
        raise UserError(f"only a Decoder continues text, got a {type(model).__name__}")
    for name, value in (("max_new_tokens", new), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} must be an integer of at least 1, got {value!r}")
    if adapters is not None and len(adapters) != len(rows):
        raise UserError(f"adapters must name one adapter for each of the {len(rows)} prompts, got {len(adapters)}")
    for index, row in enumerate(rows):
        if row.ndim != 1 or not len(row) or not np.issubdtype(row.dtype, np.integer):
            raise UserError(f"prompt {index} must be a list of at least one token, got {row.dtype} of {row.shape}")
        if not 0 <= row.min() <= row.max() < model.config.vocab_size:
            raise UserError(f"prompt {index} holds a token outside 0 to {model.config.vocab_size - 1}, which are known")
        if len(row) + new > model.config.max_tokens:
            raise UserError(
                f"prompt {index} has {len(row)} tokens, and {new} new ones (max_new_tokens) would be more than the"
                f" {model.config.max_tokens} that the model reads: shorten one of them"
            )


def _batches(rows: list[np.ndarray], size: int, longest: int) -> Iterator[tuple[int, list[int]]]:
    """Yield batches of prompts of similar length, as the length to pad them to and the indices of the prompts.

    The lengths are powers of two, or `longest`.
    """
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        length = min(max(_SHORTEST, 1 << (len(row) - 1).bit_length()), longest)
        groups.setdefault(length, []).append(index)
    for length, indices in sorted(groups.items()):
        for start in range(0, len(indices), size):
            yield length, indices[start : start + size]


def _answers(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    batch: _Batch,
    indices: list[int],
    sampling: Sampling,
    new: int,
    stop: Stop | None,
    watch: Callable[[int, list[int]], None] | None,
) -> dict[int, Answer]:
    """Continue the prompts of one batch, and return the answers by the indices of the prompts."""
    written = _read(graphdef, state, batch, new)
    answers: dict[int, Answer] = {}
    seen = 0
    at_once = 1 if watch is not None else new if stop is None else _AT_ONCE
    ends = {*np.asarray(batch.ends).tolist()}
    while len(answers) < len(indices):
        written = _write(graphdef, state, batch, written, min(seen + at_once, new), sampling)
        tokens, count = np.asarray(written.tokens), int(written.steps)
        for row, index in enumerate(indices):
            for end in range(seen + 1, count + 1):
                if index in answers:
                    break
                found = tokens[row, :end].tolist()
                if found[-1] in ends:
                    answers[index] = Answer(found[:-1], "end")
                    continue
                if watch is not None:
                    watch(index, found)
                if stop is not None and stop(index, found):
                    answers[index] = Answer(found, "stop")
                elif end == new:
                    answers[index] = Answer(found, "length")
        seen = count
        over = [row >= len(indices) or indices[row] in answers for row in range(len(tokens))]
        written = written._replace(done=jnp.asarray(over))
    return answers


def _decoded(
    graphdef: nnx.GraphDef, state: nnx.State, batch: _Batch, tokens: Array, segments: Array | None, cache: Cache
) -> tuple[Array, Cache]:
    """Return the logits after the last token, and the longer cache."""
    model = nnx.merge(graphdef, state)
    with adapter_of_examples(batch.adapters) if batch.adapters is not None else contextlib.nullcontext():
        features, cache = model.decode(tokens, cache, segments=segments)
    return model.logits(features[:, -1]), cache


@functools.partial(jax.jit, static_argnums=(0, 3))
def _read(graphdef: nnx.GraphDef, state: nnx.State, batch: _Batch, new: int) -> _Written:
    """Read the prompts."""
    size, length = batch.tokens.shape
    cache = Cache.empty(nnx.merge(graphdef, state).config, size, length + new)
    logits, cache = _decoded(graphdef, state, batch, batch.tokens, batch.segments, cache)
    return _Written(jnp.zeros((size, new), jnp.int32), jnp.int32(0), logits, jnp.zeros(size, bool), cache)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
def _write(
    graphdef: nnx.GraphDef, state: nnx.State, batch: _Batch, written: _Written, limit: Array, sampling: Sampling
) -> _Written:
    """Write tokens until there are `limit` of them or every row ends."""

    def step(written: _Written) -> _Written:
        keys = jax.vmap(jax.random.fold_in, (0, None))(batch.keys, written.steps)
        new = choose(written.logits, sampling, keys)
        tokens = jax.lax.dynamic_update_slice(written.tokens, new[:, None], (0, written.steps))
        done = written.done | (new[:, None] == batch.ends[None]).any(-1)
        logits, cache = _decoded(graphdef, state, batch, new[:, None], None, written.cache)
        return _Written(tokens, written.steps + 1, logits, done, cache)

    return jax.lax.while_loop(lambda written: (written.steps < limit) & ~written.done.all(), step, written)
