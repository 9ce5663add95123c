"""The containers for text: what they refuse, selecting, holding out."""

import numpy as np
import pytest

from surm_jax.data import TextSource, first_examples, hold_out
from surm_jax.errors import UserError


def numbered(count: int) -> TextSource:
    return TextSource([(f"first {i}", f"second {i}") for i in range(count)], np.arange(count))


@pytest.mark.parametrize("labels", [(3,), (2, 1), ()])
def test_labels_must_be_as_many_as_examples(labels):
    with pytest.raises(UserError, match=r"2 examples and labels of shape .* do not fit together: expected \(2,\)"):
        TextSource([("a",), ("b",)], np.zeros(labels, np.int64))


@pytest.mark.parametrize("sentences", [[("a",), ("b", "c")], [(), ()], [("a", "b", "c")] * 2])
def test_examples_are_all_sentences_or_all_pairs(sentences):
    with pytest.raises(UserError, match="every example must have one sentence, or every one two"):
        TextSource(sentences, np.zeros(2, np.int64))


def test_selecting_keeps_the_order_that_was_asked_for():
    some = numbered(5).select(np.array([3, 0, 3]))
    assert some.sentences == [("first 3", "second 3"), ("first 0", "second 0"), ("first 3", "second 3")]
    np.testing.assert_array_equal(some.labels, [3, 0, 3])
    assert len(numbered(5).select([])) == 0


def test_held_out_examples_are_the_same_few_in_every_run_and_the_rest_stays():
    left, held_out = hold_out(numbered(20), 6)
    assert (len(left), len(held_out)) == (14, 6)
    assert sorted([*left.labels, *held_out.labels]) == list(range(20))
    for part in (left, held_out):
        assert part.sentences == [(f"first {i}", f"second {i}") for i in part.labels]
    np.testing.assert_array_equal(hold_out(numbered(20), 6)[1].labels, held_out.labels)
    assert list(held_out.labels) not in ([*range(6)], [*range(14, 20)])


def test_holding_out_nothing_or_everything():
    source = numbered(4)
    left, held_out = hold_out(source, 0)
    assert left is source
    assert held_out is None
    for count in (-1, 4, 5):
        with pytest.raises(UserError, match=f"cannot hold out {count} examples of 4"):
            hold_out(source, count)


def test_the_first_examples_are_nested():
    few, more = (first_examples(numbered(30), count) for count in (4, 12))
    assert (len(few), len(more)) == (4, 12)
    assert set(few.labels) < set(more.labels)
    assert few.sentences == [(f"first {i}", f"second {i}") for i in few.labels]
    assert list(few.labels) != [0, 1, 2, 3]
    with pytest.raises(UserError, match="cannot train on 31 examples: there are 30"):
        first_examples(numbered(30), 31)
