"""Tests of `first_examples` and `hold_out`, which select random examples of a training set."""

import numpy as np
import pytest

from surm_jax.data import ArraySource, TextSource, first_examples, hold_out
from surm_jax.errors import UserError


def sentences(count: int) -> TextSource:
    return TextSource([(f"first {i}", f"second {i}") for i in range(count)], np.arange(count))


def numbered(labels):
    """Return a source with these labels. The single pixel of each image is the index of its example."""
    return ArraySource(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], np.array(labels))


def examples(source):
    return [(source[i]["image"].item(), source[i]["label"]) for i in range(len(source))]


def test_held_out_examples_are_the_same_few_in_every_run_and_the_rest_stays():
    source = ArraySource(np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1), np.arange(20))
    left, held_out = hold_out(source, 6)
    assert (len(left), len(held_out)) == (14, 6)
    chosen = [held_out[i]["label"] for i in range(6)]
    assert sorted([left[i]["label"] for i in range(14)] + chosen) == list(range(20))
    assert chosen not in ([*range(6)], [*range(14, 20)])
    assert held_out[2]["image"].item() == chosen[2]
    again = hold_out(source, 6)[1]
    assert [again[i]["label"] for i in range(6)] == chosen


def test_holding_out_nothing_or_everything():
    source = ArraySource(np.zeros((4, 1, 1, 1), np.uint8), np.arange(4))
    left, held_out = hold_out(source, 0)
    assert left is source
    assert held_out is None
    for count in (-1, 4, 5):
        with pytest.raises(UserError, match=f"cannot hold out {count} examples of 4"):
            hold_out(source, count)


def test_the_first_examples_are_nested_and_the_same_in_every_run():
    source = numbered(np.arange(100) % 7)
    parts = {count: examples(first_examples(source, count)) for count in (1, 10, 35, 100)}
    assert [len(part) for part in parts.values()] == list(parts)
    assert set(parts[1]) < set(parts[10]) < set(parts[35]) < set(parts[100])
    assert parts[100] == examples(source)
    assert examples(first_examples(source, 10)) == parts[10] != examples(source)[:10]
    assert first_examples(source, 10).labels.tolist() == [label for _, label in parts[10]]
    assert first_examples(source, 0) is source
    for count in (-1, 101):
        with pytest.raises(UserError, match=f"cannot train on {count} examples: there are 100"):
            first_examples(source, count)


def test_held_out_examples_are_taken_out_of_the_first():
    first = first_examples(numbered(np.arange(50)), 20)
    left, held_out = hold_out(first, 5)
    assert len(held_out) == 5
    assert sorted(examples(left) + examples(held_out)) == examples(first)


def test_held_out_sentences_are_the_same_few_in_every_run_and_the_rest_stays():
    left, held_out = hold_out(sentences(20), 6)
    assert (len(left), len(held_out)) == (14, 6)
    assert sorted([*left.labels, *held_out.labels]) == list(range(20))
    for part in (left, held_out):
        assert part.sentences == [(f"first {i}", f"second {i}") for i in part.labels]
    np.testing.assert_array_equal(hold_out(sentences(20), 6)[1].labels, held_out.labels)
    assert list(held_out.labels) not in ([*range(6)], [*range(14, 20)])


def test_holding_out_no_sentence_or_all():
    source = sentences(4)
    left, held_out = hold_out(source, 0)
    assert left is source
    assert held_out is None
    for count in (-1, 4, 5):
        with pytest.raises(UserError, match=f"cannot hold out {count} examples of 4"):
            hold_out(source, count)


def test_the_first_sentences_are_nested():
    few, more = (first_examples(sentences(30), count) for count in (4, 12))
    assert (len(few), len(more)) == (4, 12)
    assert set(few.labels) < set(more.labels)
    assert few.sentences == [(f"first {i}", f"second {i}") for i in few.labels]
    assert list(few.labels) != [0, 1, 2, 3]
    with pytest.raises(UserError, match="cannot train on 31 examples: there are 30"):
        first_examples(sentences(30), 31)
