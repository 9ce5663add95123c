"""Tests of `ArraySource`, of `ImageDataset.require_channels`, and of `keep_classes`."""

import numpy as np
import pytest

from surm_jax.data import ArraySource, ImageDataset, first_examples, keep_classes
from surm_jax.errors import UserError
from surm_jax.preparation import Preparation


def test_array_source_gives_the_image_and_a_python_label():
    images = np.arange(24, dtype=np.uint8).reshape(3, 2, 2, 2)
    example = ArraySource(images, np.array([4, 5, 6]))[1]
    np.testing.assert_array_equal(example["image"], [[[8, 9], [10, 11]], [[12, 13], [14, 15]]])
    assert example["label"] == 5
    assert type(example["label"]) is int


IMAGES, LABELS = np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS[:2], r"labels has shape \(2,\), but its images need \(3,\)"),
        (IMAGES, LABELS[:, None], r"labels has shape \(3, 1\)"),
        (IMAGES[..., 0], LABELS, r"images has shape \(3, 2, 2\).*add the channel with images\[\.\.\., None\]"),
        (IMAGES.astype(np.int64), LABELS, "images is int64, but must be uint8"),
        (IMAGES.astype(bool), LABELS, "images is bool, but must be uint8"),
        (IMAGES + np.float32(255), LABELS, r"images\[0, 0, 0, 0\] is 255.0, but .* scaled to \[-1, 1\]"),
        (IMAGES + np.float32(np.nan), LABELS, r"images\[0, 0, 0, 0\] is nan"),
        (IMAGES.astype(np.float16), LABELS, r"images lies in \[0, 0\], but .* their black is -1"),
        (IMAGES, LABELS / 2, "labels is float64, but labels must be integers"),
        (IMAGES, LABELS - 1, r"labels\[0\] is -1, but labels are counted from 0"),
    ],
)
def test_array_source_refuses_arrays_that_do_not_fit(images, labels, message):
    with pytest.raises(UserError, match=message):
        ArraySource(images, labels)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "b", "a"), "'pets'.* the classes 0 and 2 are both named 'a'"),
        (("a",), r"'pets' has 1 class\(es\)"),
        ((), r"'pets' has 0 class\(es\)"),
        (("a", 1, "b"), "the name of class 1 is 1, but must be a string"),
        (("a", " "), "the name of class 1 is empty"),
        (("a", "b"), r"pets: train_labels\[2\] is 2, but labels must be 0 to 1 \(2 classes\)"),
    ],
)
def test_a_data_set_refuses_classes_that_do_not_fit(classes, message):
    with pytest.raises(UserError, match=message):
        ImageDataset("pets", ArraySource(IMAGES, LABELS), ArraySource(IMAGES, LABELS), classes, (2, 2, 1))


def test_empty_classes_are_told():
    source = ArraySource(IMAGES, LABELS + 1)
    with pytest.warns(UserWarning, match="pets: train_labels: 2 of 5 classes have no example: 'a', 'e'; .* from 1?"):
        ImageDataset("pets", source, source, tuple("abcde"), (2, 2, 1))


def test_channels_must_be_the_models():
    source = ArraySource(np.zeros((2, 8, 8, 1), np.uint8), np.arange(2))
    data = ImageDataset("grey", source, source, ("a", "b"), (8, 8, 1))
    data.require_channels(3, Preparation(rgb=True))
    data.require_channels(1)
    with pytest.raises(UserError, match=r"'grey' has images of 1 channel\(s\), but the model reads 3"):
        data.require_channels(3)


def numbered(labels):
    """Return a source with these labels. The single pixel of each image is the index of its example."""
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
        (("cat",), r"'pets' has 1 class\(es\) \('cat',\)"),
        (("cat", "dog", "cat"), "every class can be named only once, got cat, dog, cat"),
        (("eel", "dog"), "'pets' has no test examples of the classes eel, dog"),
    ],
)
def test_classes_that_cannot_be_kept(classes, message):
    dataset = ImageDataset("pets", numbered([2, 0, 1]), numbered([0]), ("cat", "dog", "eel"), (1, 1, 1))
    with pytest.raises(UserError, match=message):
        keep_classes(dataset, classes)
