"""Tests of the batches of text for training and evaluation.

Every example occurs once in an epoch and once in an evaluation. Batches are padded correctly, and sorting by length
reduces padding. Iteration can be resumed, and several processes share the examples.
"""

import itertools
import json

import numpy as np
import pytest

from surm_jax.data import TokenSource, lengths_in_use, load, load_tokenizer, text_eval_batches, text_train_batches
from surm_jax.errors import UserError

LENGTHS = (8, 12, 16, 24)
PAD = 9_999
WINDOW = 16  # The number of batches whose examples are sorted by length together.


def source_of(sizes, labels=None) -> TokenSource:
    """Return a source of examples with these numbers of tokens.

    No token occurs twice. The default label of an example is its index.
    """
    sizes = np.asarray(sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = np.arange(offsets[-1], dtype=np.int32) + 10_000
    return TokenSource(tokens, tokens % 2, offsets, np.arange(len(sizes)) if labels is None else labels, PAD)


def mixed(count: int) -> TokenSource:
    return source_of(np.random.default_rng(count).integers(2, 25, count))


def training(source, **changes):
    return text_train_batches(source, **{"batch_size": 4, "lengths": LENGTHS, "seed": 3, **changes})


def evaluation(source, **changes):
    return text_eval_batches(source, **{"batch_size": 4, "lengths": LENGTHS, **changes})


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def assert_padded(source, batch, indices, length):
    """Check by plain loops that a batch holds the examples at `indices`, padded to `length` tokens."""
    tokens, types, mask = ([[fill] * length for _ in indices] for fill in (PAD, 0, False))
    for row, index in enumerate(indices):
        for column, place in enumerate(range(source.offsets[index], source.offsets[index + 1])):
            tokens[row][column] = source.tokens[place]
            types[row][column] = source.token_types[place]
            mask[row][column] = True
    for key, expected in (("tokens", tokens), ("token_types", types), ("token_mask", mask)):
        np.testing.assert_array_equal(batch[key], np.reshape(expected, (len(indices), length)))


def test_training_batches_have_the_promised_form_and_content():
    source = mixed(50)
    for batch in take(training(source), 40):
        assert list(batch) == ["tokens", "token_types", "token_mask", "label"]
        assert [array.dtype for array in batch.values()] == [np.int32, np.int32, np.bool_, np.int32]
        longest = source.lengths[batch["label"]].max()
        assert_padded(source, batch, batch["label"], next(length for length in LENGTHS if length >= longest))


def test_scores_stay_floats():
    scores = np.float32([0.5, 3.8, 5.0])
    source = source_of([3, 4, 5], scores)
    assert next(training(source))["label"].dtype == np.float32
    (batch,) = evaluation(source)
    assert batch["label"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], [*scores, 0])


@pytest.mark.parametrize("count", [1, 3, 40, 64, 100])
def test_every_epoch_holds_every_example_once(count):
    # A window holds 64 examples, so for most counts it ends within an epoch.
    source = mixed(count)
    batches = take(training(source), 10 * WINDOW)
    for window in range(1, 11):
        seen = np.bincount(labels(batches[: window * WINDOW]), minlength=count)
        whole, begun = divmod(window * WINDOW * 4, count)
        assert (np.sort(seen) == [whole] * (count - begun) + [whole + 1] * begun).all()


def test_every_epoch_is_in_a_new_order():
    # One window is one epoch, and all examples have the same length, so the order is purely random.
    epochs = labels(take(training(source_of([5] * 64)), 10 * WINDOW)).reshape(10, 64)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(64), (10, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 10
    companions = [{frozenset(batch) for batch in epoch.reshape(16, 4)} for epoch in epochs]
    assert all(len(one & other) < 3 for one, other in itertools.combinations(companions, 2))


def test_the_batches_of_a_window_come_in_random_order():
    sizes = [batch["tokens"].shape[1] for batch in take(training(mixed(64)), 5 * WINDOW)]
    windows = np.reshape(sizes, (5, WINDOW))
    assert all(len(set(window)) == len(LENGTHS) for window in windows)
    assert all((np.sort(window) != window).any() for window in windows)
    assert len({tuple(window) for window in windows}) == 5


def test_the_seed_decides_everything():
    source = mixed(20)
    assert_same(take(training(source), 40), take(training(source), 40))
    assert len({tuple(labels(take(training(source, seed=seed), 5))) for seed in range(20)}) == 20


def test_threads_change_nothing():
    source = mixed(23)
    straight = take(training(source, read_ahead=0), 50)
    for threads, read_ahead in ((1, 1), (4, 2), (4, 8)):
        assert_same(take(training(source, threads=threads, read_ahead=read_ahead), 50), straight)


@pytest.mark.parametrize("read_ahead", [0, 4])
@pytest.mark.parametrize("split", [0, 1, 7, 15, 16, 17, 37])
def test_resuming_continues_with_the_next_batch(read_ahead, split):
    # An epoch of 50 examples ends within a batch and within a window.
    source = mixed(50)
    straight = take(training(source, read_ahead=read_ahead), 45)
    interrupted = training(source, read_ahead=read_ahead)
    before = take(interrupted, split)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = training(source, read_ahead=read_ahead)
    resumed.set_state(state)
    assert_same(before + take(resumed, 45 - split), straight)


def test_going_back_discards_what_was_read_ahead():
    iterator = training(mixed(50))
    take(iterator, 2)
    state = iterator.get_state()
    then = take(iterator, 5)
    iterator.set_state(state)
    assert_same(take(iterator, 5), then)


def test_resuming_replays_nothing():
    # Making all batches before this step would take years.
    iterator = training(mixed(50))
    state = iterator.get_state()
    (key,) = state
    iterator.set_state({key: 10**12})
    # This step is the first one of a window and of an epoch.
    assert set(labels(take(iterator, WINDOW))) == set(range(50))


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_processes_together_make_the_batch_of_one(process_count):
    source = mixed(50)
    whole = take(training(source, batch_size=12), 40)
    share = {"batch_size": 12 // process_count, "process_count": process_count}
    parts = [take(training(source, process_index=p, **share), 40) for p in range(process_count)]
    steps = zip(*parts, strict=True)
    assert_same([{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in steps], whole)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("process_count", [1, 2, 3, 5])
def test_evaluation_sees_every_example_exactly_once(count, process_count):
    source = mixed(count)
    processes = [evaluation(source, process_index=p, process_count=process_count) for p in range(process_count)]
    steps = -(-count // (4 * process_count))
    assert {len(batches) for batches in processes} == {steps}
    seen = []
    for step in zip(*processes, strict=True):
        indices = np.concatenate([batch["index"] for batch in step])
        longest = source.lengths[indices[indices >= 0]].max()
        for batch in step:
            assert list(batch) == ["tokens", "token_types", "token_mask", "label", "mask", "index"]
            assert [batch[key].dtype for key in ("label", "mask", "index")] == [np.int32, np.bool_, np.int32]
            mask = batch["mask"]
            kept = {key: batch[key][mask] for key in batch}
            np.testing.assert_array_equal(kept["label"], kept["index"])
            assert_padded(source, kept, kept["index"], next(length for length in LENGTHS if length >= longest))
            # A row of padding has one token whose token mask is True. All other entries are padding.
            assert (batch["index"][~mask] == -1).all()
            assert not batch["label"][~mask].any()
            assert (batch["tokens"][~mask] == PAD).all()
            assert not batch["token_types"][~mask].any()
            assert batch["token_mask"][~mask, 0].all()
            assert not batch["token_mask"][~mask, 1:].any()
            seen.extend(kept["index"])
    assert len(seen) == count
    assert sorted(seen) == list(range(count))


def test_evaluation_goes_from_short_to_long_and_starts_anew_at_each_pass():
    source = source_of([20, 3, 9, 4, 8, 24])
    batches = evaluation(source)
    next(iter(batches))  # An iteration that is not completed must have no effect.
    first = list(batches)
    assert_same(first, list(batches))
    assert [batch["index"].tolist() for batch in first] == [[1, 3, 4, 2], [0, 5, -1, -1]]
    assert [batch["tokens"].shape[1] for batch in first] == [12, 24]


def test_the_lengths_in_use_are_those_that_batches_have():
    source = source_of([9, 10, 3] * 30)
    assert lengths_in_use(source, LENGTHS) == (8, 12)
    for batches in (take(training(source), 50), evaluation(source)):
        assert {batch["tokens"].shape[1] for batch in batches} == {8, 12}


def unsorted_tokens(lengths, batch_size, allowed):
    """Return how many tokens, with padding, an epoch would have if examples were not sorted by length."""
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = [lengths[order[i : i + batch_size]] for i in range(0, len(lengths) - batch_size + 1, batch_size)]
    return sum(batch_size * next(length for length in allowed if length >= batch.max()) for batch in batches)


def assert_little_waste(source, allowed, most):
    steps = len(source) // 32
    batches = take(training(source, batch_size=32, lengths=allowed), steps)
    padded = sum(batch["tokens"].size for batch in batches)
    assert padded < most * unsorted_tokens(source.lengths, 32, allowed)
    passed = sum(batch["tokens"].size for batch in evaluation(source, batch_size=32, lengths=allowed))
    in_order = [source.lengths[i : i + 32].max() for i in range(0, len(source), 32)]
    assert passed < most * sum(32 * next(length for length in allowed if length >= longest) for longest in in_order)


def test_sorting_wastes_less():
    sizes = np.clip(np.random.default_rng(0).lognormal(3.2, 0.5, 3000).astype(int), 4, 128)
    assert_little_waste(source_of(sizes), (16, 32, 48, 64, 96, 128), 0.6)


@pytest.mark.exhaustive
def test_sorting_wastes_less_on_mrpc(shared, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((shared / "data" / "weights" / "bert_base_uncased_vocab.txt").read_bytes())
    source = load_tokenizer(tmp_path).encode(load("glue/mrpc", shared / "tfds").train, 128)
    assert_little_waste(source, (32, 48, 64, 80, 96, 128), 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"read_ahead": -1}, "read_ahead is -1"),
        ({"process_count": 0}, "process_count is 0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2, but must be 0 to 1"),
        ({"process_index": -1}, "process_index is -1, but must be 0 to 0"),
        ({"lengths": ()}, r"lengths are \(\), but must be positive and increasing"),
        ({"lengths": (0, 32)}, "must be positive and increasing"),
        ({"lengths": (16, 8, 32)}, "must be positive and increasing"),
        ({"lengths": (16, 16)}, "must be positive and increasing"),
        (
            {"lengths": (4, 8)},
            "longest example has 9 tokens, but lengths end with 8: add a longer one, or encode with a",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    source = source_of([3, 9, 5])
    with pytest.raises(UserError, match=message):
        training(source, **changes)
    with pytest.raises(UserError, match=message):
        evaluation(source, **changes)


def test_training_alone_checks_the_seed():
    with pytest.raises(UserError, match="seed is -1, but must be non-negative"):
        training(mixed(4), seed=-1)


def test_empty_sources_are_refused():
    for batches in (training, evaluation):
        with pytest.raises(UserError, match="the data source is empty"):
            batches(source_of(np.zeros(0, int)))
