"""Tests of `TextSource`: the arguments that it refuses, and the selection of examples."""

import numpy as np
import pytest

from surm_jax.data import TextSource
from surm_jax.errors import UserError


def numbered(count: int) -> TextSource:
    return TextSource([(f"first {i}", f"second {i}") for i in range(count)], np.arange(count))


@pytest.mark.parametrize("labels", [(3,), (2, 1), ()])
def test_labels_must_be_as_many_as_examples(labels):
    with pytest.raises(UserError, match=r"2 examples and labels of shape .* do not fit together: expected \(2,\)"):
        TextSource([("a",), ("b",)], np.zeros(labels, np.int64))


@pytest.mark.parametrize("sentences", [[("a",), ("b", "c")], [(), ()], [("a", "b", "c")] * 2])
def test_examples_are_all_sentences_or_all_pairs(sentences):
    with pytest.raises(UserError, match="all examples must have one sentence, or all must have two"):
        TextSource(sentences, np.zeros(2, np.int64))


def test_selecting_keeps_the_order_that_was_asked_for():
    some = numbered(5).select(np.array([3, 0, 3]))
    assert some.sentences == [("first 3", "second 3"), ("first 0", "second 0"), ("first 3", "second 3")]
    np.testing.assert_array_equal(some.labels, [3, 0, 3])
    assert len(numbered(5).select([])) == 0
