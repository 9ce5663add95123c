"""Pack tokenised examples into rows of equal length for training, and make batches of them.

Several short examples share a row. Each is a segment of its own, so that the model attends only within an example and
counts positions from its start.
"""

import bisect
import functools
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from surm_jax.data.batches import Batch, EvalBatches, TrainBatches, plan_batches
from surm_jax.data.lm.encoding import LearnedTokens

NO_LABEL = -1
"""The label of a place after which the model learns no token."""

_PAD = 0  # Any token will do, because nothing attends to padding.


def pack(lengths: Int[np.ndarray, "n"], size: int) -> list[list[int]]:
    """Divide examples among rows of a given size, so that there are few rows.

    The longest examples come first, and each goes into the fullest row that has room for it (best fit decreasing). The
    result depends only on the lengths, so every epoch and every process has the same rows.

    Args:
        lengths: The number of tokens of each example, at most `size`.
        size: The number of tokens in a row.

    Returns:
        The indices of the examples in each row.

    >>> pack(np.array([3, 8, 5, 2, 6]), 8)
    [[1], [4, 3], [2, 0]]
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # The rows by the number of free places.
    rooms: list[int] = []  # The keys of `with_room`, sorted.
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), size
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(example)
        if left := room - length:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return rows


def packed_train_batches(
    source: LearnedTokens, rows: Sequence[Sequence[int]], *, length: int, seed: int, **options: Any
) -> TrainBatches:
    """Return an endless iterator over shuffled batches of packed rows.

    Every epoch contains every row once, in a new random order, and the epochs follow each other without a gap. The
    iterator can be resumed as that of `surm_jax.data.text_train_batches`.

    Args:
        source: The tokenised examples.
        rows: The indices of the examples in each row (`pack`).
        length: The number of tokens in a row.
        seed: A non-negative number that determines the order.
        **options: The fields of `BatchPlan`: `batch_size`, the number of rows, and optionally the others.

    Returns:
        An iterator over `{"tokens", "segments", "label"}`, int32 arrays of shape (batch_size, length). The segments of
        a row count its examples from 1, and are 0 for padding. A label is the next token of the same example, or
        `NO_LABEL` where this token is not learned. The skipped lines of `source` count as corrupt.

    Raises:
        UserError: An argument is out of range, or there are no rows.
    """
    plan = plan_batches(rows, options, seed)
    first = plan.process_index * plan.batch_size

    @functools.lru_cache(maxsize=4)
    def epoch_order(epoch: int) -> Int[np.ndarray, "n"]:
        return np.random.default_rng([seed, epoch]).permutation(len(rows))

    def batch(step: int) -> Batch:
        places = np.arange(first, first + plan.batch_size) + step * plan.rows
        return _batch(source, [rows[epoch_order(place // len(rows))[place % len(rows)]] for place in places], length)

    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    made = TrainBatches(iter(batches.to_iter_dataset(plan.read_options)))
    made.corrupt.update(range(len(source.skipped)))
    return made


def line_eval_batches(source: LearnedTokens, *, lengths: Sequence[int], **options: Any) -> EvalBatches:
    """Return an iterable over batches for evaluation, which contain every example once, from short to long.

    Args:
        source: The tokenised examples.
        lengths: The lengths that batches may be padded to, in increasing order. No example is longer than the last.
        **options: As in `packed_train_batches`.

    Returns:
        An iterable over batches as in `packed_train_batches` with one example in each row, and with the arrays `"mask":
        bool (batch_size,)`, False for a row of padding, and `"index": int32 (batch_size,)`, the index of the example in
        the source, or -1.

    Raises:
        UserError: An argument is out of range, or the source is empty.
    """
    plan = plan_batches(source, options)
    by_length = np.argsort(source.lengths, kind="stable")

    def batch(step: int) -> Batch:
        indices = by_length[step * plan.rows : (step + 1) * plan.rows]
        mine = indices[plan.process_index * plan.batch_size : (plan.process_index + 1) * plan.batch_size]
        length = lengths[np.searchsorted(lengths, source.lengths[indices].max())]
        index = np.pad(mine, (0, plan.batch_size - len(mine)), constant_values=-1).astype(np.int32)
        groups = [[example] if example >= 0 else [] for example in index]
        return {**_batch(source, groups, length), "mask": index >= 0, "index": index}

    batches = grain.MapDataset.range(plan.steps(len(source))).map(batch)
    return EvalBatches(len(source) + len(source.skipped), batches, plan.read_options)


def _batch(source: LearnedTokens, rows: Sequence[Sequence[int]], length: int) -> Batch:
    shape = (len(rows), length)
    tokens, segments = np.full(shape, _PAD, np.int32), np.zeros(shape, np.int32)
    labels = np.full(shape, NO_LABEL, np.int32)
    for row, examples in enumerate(rows):
        end = 0
        for segment, example in enumerate(examples, 1):
            start, part = end, slice(source.offsets[example], source.offsets[example + 1])
            end += part.stop - part.start
            tokens[row, start:end], segments[row, start:end] = source.tokens[part], segment
            following, learned = source.tokens[part][1:], source.learned[part][1:]
            labels[row, start : end - 1] = np.where(learned, following, NO_LABEL)
    return {"tokens": tokens, "segments": segments, "label": labels}
