"""Tests of `ArraySource`, of `ImageDataset.require_channels`, and of `keep_classes`."""

import numpy as np
import pytest

from surm_jax.data import ArraySource, ImageDataset, first_examples, keep_classes
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


def numbered(labels):
    """Return a source with these labels. The single pixel of each image is the index of the example."""
    return ArraySource(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], np.array(labels))


def examples(source):
    return [(source[i]["image"].item(), source[i]["label"]) for i in range(len(source))]


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
        (("cat", "dog", "cat"), "every class can be named only once, got cat, dog, cat"),
        (("eel", "dog"), "'pets' has no test examples of the classes eel, dog"),
    ],
)
def test_classes_that_cannot_be_kept(classes, message):
    dataset = ImageDataset("pets", numbered([2, 0, 1]), numbered([0]), ("cat", "dog", "eel"), (1, 1, 1))
    with pytest.raises(UserError, match=message):
        keep_classes(dataset, classes)
