"""Tests of `TextSource` and `TextDataset`: the arguments that they refuse, and the selection of examples."""

import numpy as np
import pytest

from surm_jax.data import TextDataset, TextSource, TokenSource
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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], "label 1 is -1, but classes are counted from 0"),
        (np.array([0, 2**40]), "label 1 is 1099511627776, but classes are counted from 0 and below 1,000,000"),
        ([0.5, np.nan], "label 1 is nan, but scores must be finite"),
        ([True, False], "labels are bool, but must be integers counted from 0"),
        (["a", "b"], "labels are <U1, but must be integers counted from 0"),
    ],
)
def test_labels_are_classes_or_scores(labels, message):
    with pytest.raises(UserError, match=message):
        TextSource([("a",), ("b",)], labels)
    with pytest.raises(UserError, match=message):
        TokenSource(np.arange(2), np.zeros(2, int), np.arange(3), labels, pad_token=0)


def test_labels_get_one_dtype():
    assert TextSource([("a",)], np.uint8([3])).labels.dtype == np.int64
    assert TextSource([("a",)], [3.5]).labels.dtype == np.float32


@pytest.mark.parametrize("wrong", [b"bytes", None, 3, "\ud800"])
def test_sentences_are_text(wrong):
    with pytest.raises(UserError, match=r"example 1 holds .*, but sentences must be text"):
        TextSource([("a", "b"), ("a", wrong)], np.zeros(2, int))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": [-1, 2]}, "tokens must be integers from 0"),
        ({"tokens": [0.5, 2]}, "tokens must be integers from 0"),
        ({"token_types": [0]}, "2 tokens, token types of shape"),
        ({"offsets": [0, 3]}, "offsets from 0 to 3 do not fit together"),
        ({"offsets": [1, 2]}, "offsets from 1 to 2 do not fit together"),
    ],
)
def test_tokens_fit_together(values, message):
    arrays = {"tokens": [1, 2], "token_types": [0, 0], "offsets": [0, 2], "labels": [0], **values}
    with pytest.raises(UserError, match=message):
        TokenSource(**{name: np.array(value) for name, value in arrays.items()}, pad_token=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ("a", "a")}, r"classes must be different lines of text, got \['a', 'a'\]"),
        ({"classes": ("a", " ")}, "classes must be different lines of text"),
        ({"classes": ("a", "b\tc")}, "classes must be different lines of text"),
        ({"classes": ("a", 1)}, "classes must be different lines of text"),
        ({"classes": ("a",)}, "has the single class 'a'"),
        ({"classes": ()}, "split train: labels are int64, but scores must be float32"),
        ({"tests": {}}, "has no test split"),
        ({"tests": {"test": numbered(0)}}, "split test has no examples"),
        ({"tests": {"test": numbered(3)}}, "split test: example 2 has label 2, outside 0 to 1"),
        ({"train": TextSource([("a", "b")], [0.5])}, "split train: labels are float32, but must be integers"),
        ({"columns": ("sentence",)}, "split train: examples have 2 sentence.s., but the columns are sentence"),
    ],
)
def test_the_parts_of_a_data_set_fit_together(values, message):
    parts = {"train": numbered(2), "tests": {"test": numbered(2)}, "classes": ("a", "b"), "columns": ("one", "two")}
    with pytest.raises(UserError, match=f"^mine.*{message}"):
        TextDataset(name="mine", metrics=("accuracy",), **{**parts, **values})


def test_a_class_without_training_examples_is_said():
    with pytest.warns(UserWarning, match="mine has no training example of the class 'b'"):
        TextDataset("mine", numbered(1), {"test": numbered(2)}, ("a", "b"), ("one", "two"), ("accuracy",))
