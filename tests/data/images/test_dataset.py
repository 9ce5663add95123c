"""The containers: what an array source gives back and refuses, the check of channels, parts of a set."""

import numpy as np
import pytest

from surm_jax.data import ArraySource, ImageDataset, first_examples, hold_out, keep_classes
from surm_jax.errors import UserError


def test_array_source_gives_the_image_and_a_python_label():
    images = np.arange(24, dtype=np.uint8).reshape(3, 2, 2, 2)
    example = ArraySource(images, np.array([4, 5, 6]))[1]
    np.testing.assert_array_equal(example["image"], [[[8, 9], [10, 11]], [[12, 13], [14, 15]]])
    assert example["label"] == 5
    assert type(example["label"]) is int


@pytest.mark.parametrize(("images", "labels"), [((3, 2, 2, 1), (2,)), ((3, 2, 2), (3,)), ((3, 2, 2, 1), (3, 1))])
def test_array_source_refuses_arrays_that_do_not_fit(images, labels):
    with pytest.raises(UserError, match="do not fit together"):
        ArraySource(np.zeros(images, np.uint8), np.zeros(labels, np.int64))


def test_channels_must_be_the_models():
    source = ArraySource(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int64))
    data = ImageDataset("grey", source, source, ("a",), (8, 8, 1))
    data.require_channels(1)
    with pytest.raises(UserError, match=r"'grey' has images of 1 channel\(s\), but the model reads 3"):
        data.require_channels(3)


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


def numbered(labels):
    """Images that say which example they are."""
    return ArraySource(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], np.array(labels))


def examples(source):
    return [(source[i]["image"].item(), source[i]["label"]) for i in range(len(source))]


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


def test_classes_that_are_kept_are_relabelled_in_their_order():
    train, test = numbered([2, 0, 1, 3, 2]), numbered([3, 3, 1])
    dataset = ImageDataset("pets", train, test, ("cat", "dog", "eel", "ox"), (1, 1, 1))
    kept = keep_classes(dataset, ("ox", "eel"))
    assert kept.classes == ("ox", "eel")
    assert examples(kept.train) == [(0, 1), (3, 0), (4, 1)]
    assert examples(kept.test) == [(0, 0), (1, 0)]
    for source in (kept.train, kept.test, first_examples(kept.train, 2)):
        assert source.labels.tolist() == [label for _, label in examples(source)]
    assert (kept.name, kept.image_shape) == ("pets", (1, 1, 1))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dgo"), r"'pets' has no class 'dgo'; did you mean 'dog'\? \(its classes: cat, dog, eel\)"),
        (("cat", "dog", "cat"), "every class can be named once, got cat, dog, cat"),
        (("eel", "dog"), "'pets' has no test examples of the classes eel, dog"),
    ],
)
def test_classes_that_cannot_be_kept(classes, message):
    dataset = ImageDataset("pets", numbered([2, 0, 1]), numbered([0]), ("cat", "dog", "eel"), (1, 1, 1))
    with pytest.raises(UserError, match=message):
        keep_classes(dataset, classes)
