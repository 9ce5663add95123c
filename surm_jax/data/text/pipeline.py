"""Make batches of tokenised text with little padding, by putting examples of similar length into the same batch.

A batch is padded to the smallest of a few given lengths that its longest example fits into. So batches have few
different shapes, and JAX compiles a program once for each shape.
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from surm_jax.data.batches import Batch, EvalBatches, TrainBatches, plan_batches
from surm_jax.data.states import States
from surm_jax.data.text.tokenizer import TokenSource
from surm_jax.errors import UserError

# The number of training batches whose examples are sorted by length together. With a larger window, less padding is
# needed, but the order of the examples is less random.
WINDOW = 16


def text_train_batches(
    source: TokenSource,
    *,
    lengths: Sequence[int],
    seed: int,
    states: States | None = None,
    **options: Any,
) -> TrainBatches:
    """Return an endless iterator over shuffled batches of tokenised text for training.

    Every epoch contains every example once, in a new random order. The epochs follow each other without a gap, so no
    example is dropped. This stream is divided into windows of 16 batches. The examples of a window are sorted by their
    padded length and divided into batches, which are then shuffled. Examples of equal padded length keep their random
    order.

    The iterator can be resumed: `get_state()` returns a small dictionary for JSON. Another iterator with the same
    arguments continues with the next batch after `set_state` with this dictionary, without making the earlier batches
    again.

    Args:
        source: The tokenised examples.
        lengths: The lengths that batches may be padded to, in increasing order. The last one must be at least the
            length of the longest example.
        seed: A non-negative number that determines the order.
        states: States that take the place of the tokens in the batches, in an otherwise equal batch. Their dtype is
            kept, and padding is zeros.
        **options: The fields of `BatchPlan`: `batch_size`, and optionally the others. In each step, the batches of all
            processes have the same length.

    Returns:
        An iterator over `{"tokens": int32 (batch_size, t), "token_types": int32 (batch_size, t), "token_mask": bool
        (batch_size, t), "label": int32 or float32 (batch_size,)}`. The length `t` is the smallest of `lengths` that the
        examples of this step fit into, including those of other processes. The token mask is False for padding, whose
        token is the source's `pad_token` and whose token type is 0.

    Raises:
        UserError: An argument is out of range, or the source is empty.

    Here, two examples of 3 tokens are padded to the length 4, so 6 of the 8 entries are tokens:

    >>> source = TokenSource(np.arange(6), np.zeros(6, int), np.array([0, 3, 6]), np.array([0, 1]), pad_token=0)
    >>> batch = next(text_train_batches(source, batch_size=2, lengths=(4, 8), seed=0))
    >>> batch["tokens"].shape, int(batch["token_mask"].sum())
    ((2, 4), 6)
    """
    plan = plan_batches(source, options, seed)
    buckets = _buckets(source, lengths)
    rows, mine = plan.rows, slice(plan.process_index * plan.batch_size, (plan.process_index + 1) * plan.batch_size)

    @functools.lru_cache(maxsize=4)
    def epoch_order(epoch: int) -> Int[np.ndarray, "n"]:
        return np.random.default_rng([seed, 0, epoch]).permutation(len(source))

    @functools.lru_cache(maxsize=4)
    def window(number: int) -> Int[np.ndarray, "batch row"]:
        places = np.arange(number * WINDOW * rows, (number + 1) * WINDOW * rows)
        epochs, places = np.divmod(places, len(source))
        stream = np.concatenate([epoch_order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        by_length = stream[np.argsort(buckets[stream], kind="stable")]
        return np.random.default_rng([seed, 1, number]).permutation(by_length.reshape(WINDOW, rows))

    def batch(step: int) -> Batch:
        indices = window(step // WINDOW)[step % WINDOW]
        return _padded(source, indices[mine], lengths[buckets[indices].max()], states=states)

    # A batch depends only on the number of its step, so resuming at any step does not make earlier batches again.
    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    return TrainBatches(iter(batches.to_iter_dataset(plan.read_options)))


def text_eval_batches(
    source: TokenSource,
    *,
    lengths: Sequence[int],
    states: States | None = None,
    **options: Any,
) -> EvalBatches:
    """Return an iterable over batches for evaluation, which contain every example once, from short to long.

    It can be iterated several times, and each time starts at the first batch.

    Incomplete batches are padded, so no example is dropped. All processes yield the same number of batches,
    `ceil(n / (batch_size * process_count))` for n examples. Some or all rows in the last batch of a process may be
    padding.

    Args:
        source: The tokenised examples.
        lengths: The lengths that batches may be padded to, as in `text_train_batches`.
        states: As in `text_train_batches`.
        **options: The fields of `BatchPlan`: `batch_size`, and optionally the others.

    Returns:
        An iterable over batches as in `text_train_batches`, with two more arrays: `"mask": bool (batch_size,)`, and
        `"index": int32 (batch_size,)`, the index of each example in the source. A row of padding has mask False, index
        -1 and label 0, and all its tokens are `pad_token`. But its token mask is True for the first token, since
        attention without any token to attend to gives NaN.

    Raises:
        UserError: An argument is out of range, or the source is empty.
    """
    plan = plan_batches(source, options)
    buckets = _buckets(source, lengths)
    rows = plan.rows
    by_length = np.argsort(buckets, kind="stable")

    def batch(step: int) -> Batch:
        indices = by_length[step * rows : (step + 1) * rows]
        mine = indices[plan.process_index * plan.batch_size : (plan.process_index + 1) * plan.batch_size]
        padding = plan.batch_size - len(mine)
        made = _padded(source, mine, lengths[buckets[indices].max()], padding, states)
        index = np.pad(mine, (0, padding), constant_values=-1).astype(np.int32)
        return {**made, "mask": index >= 0, "index": index}

    batches = grain.MapDataset.range(plan.steps(len(source))).map(batch)
    return EvalBatches(len(source), batches, plan.read_options)


def lengths_in_use(source: TokenSource, lengths: Sequence[int]) -> tuple[int, ...]:
    """Return those of the given lengths that batches of these examples can be padded to.

    Raises:
        UserError: The lengths do not increase, or the longest example is longer than all of them.

    In the example, the source has an example of 2 tokens, which is padded to 4, and one of 7 tokens, which is padded
    to 8:

    >>> source = TokenSource(np.arange(9), np.zeros(9, int), np.array([0, 2, 9]), np.array([0, 1]), pad_token=0)
    >>> lengths_in_use(source, (4, 6, 8, 16))
    (4, 8)
    """
    return tuple(lengths[place] for place in np.unique(_buckets(source, lengths)))


def _padded(
    source: TokenSource, indices: Int[np.ndarray, "n"], length: int, padding: int = 0, states: States | None = None
) -> Batch:
    """Return a batch of the examples at `indices`, padded to `length` tokens, with `padding` empty rows at the end."""
    shape = (len(indices) + padding, length)
    batch = {
        "tokens": np.full(shape, source.pad_token, np.int32),
        "token_types": np.zeros(shape, np.int32),
        "token_mask": np.zeros(shape, bool),
        "label": np.zeros(shape[0], np.int32 if np.issubdtype(source.labels.dtype, np.integer) else np.float32),
    }
    for row, index in enumerate(indices):
        place = slice(source.offsets[index], source.offsets[index + 1])
        filled = slice(place.stop - place.start)
        batch["tokens"][row, filled] = source.tokens[place]
        batch["token_types"][row, filled] = source.token_types[place]
        batch["token_mask"][row, filled] = True
    batch["token_mask"][len(indices) :, 0] = True
    batch["label"][: len(indices)] = source.labels[indices]
    return batch if states is None else {**batch, "tokens": states.take(indices, length, padding)}


def _buckets(source: TokenSource, lengths: Sequence[int]) -> Int[np.ndarray, "n"]:
    """Return for each example the index in `lengths` of the smallest length that the example fits into.

    Raises:
        UserError: The lengths do not increase, or the longest example is longer than all of them.
    """
    if not lengths or lengths[0] < 1 or any(after <= before for before, after in itertools.pairwise(lengths)):
        raise UserError(f"lengths are {lengths}, but must be positive and increasing")
    if (longest := source.lengths.max()) > lengths[-1]:
        raise UserError(
            f"the longest example has {longest} tokens, but lengths end with {lengths[-1]}: add a longer one, or "
            f"encode with a max_length of {lengths[-1]}"
        )
    return np.searchsorted(lengths, source.lengths)
