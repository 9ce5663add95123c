"""Packed rows, and batches of them: complete, shuffled, resumable, and the same for any number of processes."""

import itertools

import numpy as np
import pytest

from surm_jax.data.lm.encoding import LearnedTokens
from surm_jax.data.lm.pipeline import NO_LABEL, line_eval_batches, pack, packed_train_batches

SIZE = 16


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, SIZE + 1, 37)
    offsets = np.cumsum([0, *lengths])
    learned = rng.random(offsets[-1]) < 0.5
    return LearnedTokens(np.arange(1, offsets[-1] + 1, dtype=np.int32), learned, offsets, skipped=("line 3: bad",))


def test_every_example_is_in_one_row_and_rows_are_few():
    rng = np.random.default_rng(1)
    for _ in range(30):
        lengths = rng.integers(1, SIZE + 1, rng.integers(1, 80))
        rows = pack(lengths, SIZE)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        filled = [int(lengths[row].sum()) for row in rows]
        assert max(filled) <= SIZE
        # No two rows fit into one, so at most one is half empty.
        assert all(one + other > SIZE for one, other in itertools.combinations(filled, 2))


def test_segments_and_labels_of_a_batch(source):
    rows = pack(source.lengths, SIZE)
    batch = next(packed_train_batches(source, rows, length=SIZE, seed=0, batch_size=len(rows)))
    seen = 0
    for tokens, segments, labels in zip(batch["tokens"], batch["segments"], batch["label"], strict=True):
        for place in range(SIZE):
            follows = place + 1 < SIZE and segments[place] == segments[place + 1] > 0
            learned = follows and source.learned[tokens[place + 1] - 1]
            assert labels[place] == (tokens[place + 1] if learned else NO_LABEL)
        seen += (segments > 0).sum()
    assert seen == len(source.tokens)


def test_training_batches_resume_and_are_shared_among_processes(source):
    rows = pack(source.lengths, SIZE)
    whole = packed_train_batches(source, rows, length=SIZE, seed=3, batch_size=6)
    expected = [next(whole)["tokens"] for _ in range(9)]
    halves = [
        packed_train_batches(source, rows, length=SIZE, seed=3, batch_size=3, process_index=index, process_count=2)
        for index in range(2)
    ]
    for batch in expected[:4]:
        np.testing.assert_array_equal(np.concatenate([next(half)["tokens"] for half in halves]), batch)
    assert whole.corrupt == {0}
    resumed = packed_train_batches(source, rows, length=SIZE, seed=3, batch_size=3, process_count=2, process_index=1)
    resumed.set_state(halves[1].get_state())
    for batch in expected[4:]:
        np.testing.assert_array_equal(next(resumed)["tokens"], batch[3:])


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_has_every_example_once(source, processes):
    options = {"lengths": (4, 8, SIZE), "batch_size": 4, "process_count": processes}
    parts = [line_eval_batches(source, process_index=index, **options) for index in range(processes)]
    assert parts[0].examples == len(source) + 1
    indices = []
    for batches in zip(*parts, strict=True):
        assert len({batch["tokens"].shape for batch in batches}) == 1
        for batch in batches:
            assert batch["tokens"].shape[1] in (4, 8, SIZE)
            indices += batch["index"][batch["mask"]].tolist()
            assert (batch["label"][~batch["mask"]] == NO_LABEL).all()
            for row, index in enumerate(batch["index"]):
                if index >= 0:
                    part = source.tokens[slice(*source.offsets[index : index + 2])]
                    np.testing.assert_array_equal(batch["tokens"][row, : len(part)], part)
    assert sorted(indices) == list(range(len(source)))
