"""Tests of the batches of images for training and evaluation.

Every example occurs once in an epoch and once in an evaluation. The seed determines the batches. Iteration can be
resumed, and several processes share the examples.
"""

import itertools
import json

import numpy as np
import pytest

from surm_jax.data import ArraySource, eval_batches, eval_image, load, train_batches
from surm_jax.errors import UserError
from tests.speeds import fast


def numbered(count: int) -> ArraySource:
    """Return a source of random bright images, in which the label of each example is its index."""
    images = np.random.default_rng(1).integers(100, 256, (count, 8, 8, 1), dtype=np.uint8)
    return ArraySource(images, np.arange(count))


def training(source, **changes):
    arguments = {"batch_size": 4, "image_size": 8, "augment": "affine", "seed": 3, **changes}
    return train_batches(source, **arguments)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one["label"], other["label"])
        np.testing.assert_array_equal(one["image"], other["image"])


def test_training_batches_have_the_promised_form_and_values():
    source = numbered(10)
    batch = next(training(source, augment="none"))
    assert set(batch) == {"image", "label"}
    assert (batch["image"].dtype, batch["image"].shape) == (np.float32, (4, 8, 8, 1))
    assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (4,))
    np.testing.assert_allclose(batch["image"], source.images[batch["label"]] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_every_epoch_is_a_new_permutation(count):
    # The batch size does not divide any of these counts, so that batches contain examples of several epochs. For the
    # smallest counts, a batch is larger than the source.
    seen = labels(take(training(numbered(count), batch_size=3), 4 * count))[: 12 * count]
    epochs = seen.reshape(12, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (12, 1)))
    if count >= 7:
        assert len({tuple(epoch) for epoch in epochs}) > 10


def test_augmentation_differs_between_examples_and_epochs():
    same = ArraySource(np.repeat(numbered(1).images, 9, axis=0), np.arange(9))
    first, second = take(training(same, batch_size=9), 2)
    assert len({image.tobytes() for image in first["image"]}) > 3
    crops = [
        {label: image.tobytes() for label, image in zip(b["label"], b["image"], strict=True)} for b in (first, second)
    ]
    assert sum(crops[0][label] != crops[1][label] for label in range(9)) > 3


def test_the_seed_decides_everything():
    source = numbered(20)
    assert_same(take(training(source), 12), take(training(source), 12))
    orders = {tuple(labels(take(training(source, seed=seed), 5))) for seed in range(20)}
    assert len(orders) == 20
    # The orders of the epochs must all differ. In particular, an epoch with one seed must not have the order of another
    # epoch with the next seed.
    runs = [labels(take(training(source, seed=seed), 20)).reshape(4, 20) for seed in range(10)]
    assert len({tuple(epoch) for run in runs for epoch in run}) == 40
    # With another seed, the augmentation must differ too.
    one = ArraySource(source.images[:1], np.zeros(1, np.int64))
    images = [take(training(one, batch_size=16, seed=seed), 1)[0]["image"] for seed in (0, 1)]
    assert (images[0] != images[1]).any()


def test_threads_change_nothing():
    source = numbered(13)
    straight = take(training(source, read_ahead=0), 20)
    for threads, read_ahead in ((1, 1), (4, 2), (4, 8)):
        assert_same(take(training(source, threads=threads, read_ahead=read_ahead), 20), straight)


@pytest.mark.parametrize("read_ahead", [0, 4])
@pytest.mark.parametrize("split", [0, 1, 3, 7])
def test_resuming_continues_with_the_next_batch(read_ahead, split):
    # With 10 examples in batches of 4, the first epoch ends within the third batch.
    source = numbered(10)
    straight = take(training(source, read_ahead=read_ahead), 7)
    interrupted = training(source, read_ahead=read_ahead)
    before = take(interrupted, split)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = training(source, read_ahead=read_ahead)
    resumed.set_state(state)
    assert_same(before + take(resumed, 7 - split), straight)


def test_going_back_discards_what_was_read_ahead():
    iterator = training(numbered(10))
    first = take(iterator, 2)
    state = iterator.get_state()
    then = take(iterator, 5)
    iterator.set_state(state)
    assert_same(take(iterator, 5), then)
    assert not np.array_equal(first[0]["label"], then[0]["label"])


@pytest.mark.parametrize("process_count", fast([2, 3, 4]))
def test_processes_together_make_the_batch_of_one(process_count):
    source = numbered(10)
    whole = take(training(source, batch_size=12), 9)
    parts = [
        take(training(source, batch_size=12 // process_count, process_index=p, process_count=process_count), 9)
        for p in range(process_count)
    ]
    for step, batch in enumerate(whole):
        together = sorted(
            (int(label), image.tobytes())
            for part in parts
            for label, image in zip(part[step]["label"], part[step]["image"], strict=True)
        )
        assert together == sorted(
            (int(label), image.tobytes()) for label, image in zip(batch["label"], batch["image"], strict=True)
        )


class Recording(ArraySource):
    """A source that records the indices of the examples that were read."""

    def __getitem__(self, index):
        self.__dict__.setdefault("read", set()).add(index)
        return super().__getitem__(index)


def test_processes_read_disjoint_examples():
    read = []
    for process in range(2):
        source = Recording(numbered(20).images, np.arange(20))
        iterator = training(source, batch_size=5, process_index=process, process_count=2, read_ahead=0)
        source.__dict__["read"].clear()  # `train_batches` has read one example to get its shape.
        take(iterator, 2)
        read.append(source.__dict__["read"])
    assert read[0] | read[1] == set(range(20))
    assert not read[0] & read[1]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("process_count", [1, 2, 3, 5])
def test_evaluation_sees_every_example_exactly_once(count, process_count):
    source = numbered(count)
    processes = [
        eval_batches(source, batch_size=4, image_size=8, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    seen = []
    for batches in processes:
        listed = list(batches)
        assert len(listed) == len(batches) == -(-count // (4 * process_count))
        for batch in listed:
            assert batch["image"].shape == (4, 8, 8, 1)
            assert [batch[key].dtype for key in ("image", "label", "mask")] == [np.float32, np.int32, np.bool_]
            assert not batch["image"][~batch["mask"]].any()
            assert not batch["label"][~batch["mask"]].any()
            kept = batch["label"][batch["mask"]]
            np.testing.assert_allclose(batch["image"][batch["mask"]], source.images[kept] / 127.5 - 1, atol=1e-6)
            seen.extend(kept)
    assert sorted(seen) == list(range(count))


def test_evaluation_starts_anew_at_each_pass():
    batches = eval_batches(numbered(9), batch_size=4, image_size=8)
    next(iter(batches))  # An iteration that is not completed must have no effect.
    first, second = list(batches), list(batches)
    assert_same(first, second)
    np.testing.assert_array_equal(labels(first), [*range(9), 0, 0, 0])


def test_images_of_different_sizes_share_a_batch():
    class Mixed(ArraySource):
        def __getitem__(self, index):
            return {"image": np.full((3 + index, 5, 3), 40 * index, np.uint8), "label": index}

    source = Mixed(np.zeros((4, 1, 1, 1), np.uint8), np.arange(4))
    (batch,) = eval_batches(source, batch_size=4, image_size=6)
    for i in range(4):
        np.testing.assert_array_equal(batch["image"][i], eval_image(source[i]["image"], 6))
    assert next(training(source, image_size=6))["image"].shape == (4, 6, 6, 3)


def test_a_failing_example_reaches_the_caller_through_the_threads():
    class Broken(ArraySource):
        def __getitem__(self, index):
            if index == 5:
                raise UserError("example 5 is broken")
            return super().__getitem__(index)

    source = Broken(numbered(8).images, np.arange(8))
    with pytest.raises(UserError, match="example 5 is broken"):
        take(training(source), 2)
    with pytest.raises(UserError, match="example 5 is broken"):
        list(eval_batches(source, batch_size=2, image_size=8))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 1), np.nan), r"the image\[0, 0, 0\] is nan"),
        (np.full((8, 8, 1), 2.0), r"the image\[0, 0, 0\] is 2.0, but .* scaled to \[-1, 1\]"),
        (np.full((8, 8, 1), 255), "the image is int64, but must be uint8"),
        (np.zeros((8, 8), np.uint8), r"an image has shape \(8, 8\).*image\[\.\.\., None\]"),
    ],
)
def test_images_of_any_source_are_checked(image, message):
    class Wrong(ArraySource):
        def __getitem__(self, index):
            return {"image": image, "label": 0}

    source = Wrong(numbered(2).images, np.arange(2))
    with pytest.raises(UserError, match=message):
        training(source)
    with pytest.raises(UserError, match=message):
        eval_batches(source, batch_size=2, image_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"image_size": -1}, "image_size is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"read_ahead": -1}, "read_ahead is -1"),
        ({"process_count": 0}, "process_count is 0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2, but must be 0 to 1"),
        ({"process_index": -1}, "process_index is -1, but must be 0 to 0"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        training(numbered(4), **changes)
    with pytest.raises(UserError, match=message):
        eval_batches(numbered(4), **{"batch_size": 4, "image_size": 8, **changes})


def test_training_alone_checks_seed_and_augment():
    with pytest.raises(UserError, match="seed is -1"):
        training(numbered(4), seed=-1)
    with pytest.raises(UserError, match=r"augment must be one of .*'crop-flip'; did you mean 'crop_flip'"):
        training(numbered(4), augment="crop-flip")


def test_empty_sources_are_refused():
    with pytest.raises(UserError, match="empty"):
        training(ArraySource(np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int64)))
    with pytest.raises(UserError, match="empty"):
        eval_batches(ArraySource(np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int64)), batch_size=1, image_size=8)


def test_digits_run_through_both_directions():
    data = load("digits_5to9")
    batch = next(train_batches(data.train, batch_size=1000, image_size=16, augment="affine", seed=0))
    assert batch["image"].shape == (1000, 16, 16, 1)
    assert set(batch["label"]) == set(range(5))
    assert sum(batch["mask"].sum() for batch in eval_batches(data.test, batch_size=64, image_size=8)) == len(data.test)
