"""The containers: what an array source gives back and refuses, the check of channels, holding out."""

import numpy as np
import pytest

from surm_jax.data import ArraySource, ImageDataset, hold_out
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
