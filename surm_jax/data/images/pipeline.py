"""Make batches of images for training and evaluation."""

import functools
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from surm_jax.data.batches import Batch, BatchPlan, EvalBatches, TrainBatches, plan_batches
from surm_jax.data.corrupt import CorruptExampleError, Readable
from surm_jax.data.images.dataset import ImageSource
from surm_jax.data.images.transforms import SQUARE, Augment, eval_image, train_image
from surm_jax.data.states import States
from surm_jax.errors import UserError, require_one_of
from surm_jax.preparation import Preparation


def train_batches(
    source: ImageSource,
    *,
    image_size: int,
    augment: Augment,
    seed: int,
    preparation: Preparation = SQUARE,
    max_corrupt: int = 0,
    states: States | None = None,
    **options: Any,
) -> TrainBatches:
    """Return an endless iterator over shuffled batches of augmented images for training.

    Every epoch contains every example once, in a new order and with new augmentation. Both depend only on `seed`. No
    example is dropped: each epoch starts directly after the last example of the previous one, so that a batch may hold
    examples of several epochs.

    The iterator can be resumed: `get_state()` returns a small dictionary for JSON. Another iterator with the same
    arguments continues with the next batch after `set_state` with this dictionary.

    A corrupt example, which cannot be read, is replaced by the next readable one of the source. A warning names each
    corrupt example once, and the process that reads it records it in `TrainBatches.corrupt`.

    Args:
        source: The labelled images, of shape (height, width, channels). Their heights and widths may differ, but their
            numbers of channels must be equal.
        image_size: The height and width of the images in a batch.
        augment: The augmentation, "crop_flip", "affine" or "none". See `train_image`.
        seed: A non-negative number that determines the order and the augmentation.
        preparation: How images are resized, cropped and normalised, as in `eval_image`. With the default they are
            resized to a square and scaled to [-1, 1].
        max_corrupt: The number of corrupt examples that may be skipped.
        states: States that take the place of the images in the batches, in the same order. No image is read then, so
            `image_size`, `augment`, `preparation` and `max_corrupt` have no effect.
        **options: The fields of `BatchPlan`: `batch_size`, and optionally the others.

    Returns:
        An iterator over `{"image": float32 (batch_size, image_size, image_size, channels), "label": int32
        (batch_size,)}`.

    Raises:
        UserError: An argument is out of range, or the source is empty. The iterator raises this error too, if more than
            `max_corrupt` examples are corrupt. The message names one of them.
    """
    plan = plan_batches(source, options, seed)
    require_one_of("augment", augment, typing.get_args(Augment))
    if states is None:
        readable = Readable(source, max_corrupt)
        _channels(readable, image_size, preparation)
        augmented = functools.partial(_train_example, image_size=image_size, augment=augment, preparation=preparation)
        # The order depends on `seed` and on the place of `shuffle` in this chain, so it has the same place in both.
        examples = grain.MapDataset.source(readable).seed(seed).shuffle().random_map(augmented).repeat()
    else:
        examples = grain.MapDataset.source(_Stored(source.labels, states)).seed(seed).shuffle().repeat()

    def mine(place: int) -> dict[str, Any]:
        step, row = divmod(place, plan.batch_size)
        return examples[step * plan.rows + plan.process_index * plan.batch_size + row]

    # The examples are divided among processes after the shuffle, so all processes use the same order, and the same
    # random generator for each place in it. An example is read only when it is indexed, so no process reads the
    # examples of another.
    batches = grain.MapDataset.range(len(examples) // plan.process_count).map(mine)
    batches = batches.batch(plan.batch_size, batch_fn=_stacked).to_iter_dataset(plan.read_options)
    return TrainBatches(iter(batches), max_corrupt)


def eval_batches(
    source: ImageSource,
    *,
    image_size: int,
    preparation: Preparation = SQUARE,
    max_corrupt: int = 0,
    states: States | None = None,
    **options: Any,
) -> EvalBatches:
    """Return an iterable over batches for evaluation, which contain every example exactly once, in order.

    It can be iterated several times, and each time starts at the first example.

    Incomplete batches are padded, so no example is dropped. All processes yield the same number of batches, `ceil(n /
    (batch_size * process_count))` for n examples, so some batches may hold only padding. A corrupt example is masked
    like padding, and a warning names it.

    Args:
        source: The labelled images.
        image_size: The height and width of the images in a batch.
        preparation: How images are prepared, as in `train_batches`.
        max_corrupt: The number of corrupt examples that each process may mask.
        states: As in `train_batches`.
        **options: The fields of `BatchPlan`: `batch_size`, and optionally the others.

    Returns:
        An iterable over `{"image": float32 (batch_size, image_size, image_size, channels), "label": int32
        (batch_size,), "mask": bool (batch_size,), "index": int32 (batch_size,)}`. The index is that of the example in
        the source. Where the mask is False, the image and the label are zeros, and the index is -1.

    Raises:
        UserError: An argument is out of range, or the source is empty. Iterating raises this error too, if more than
            `max_corrupt` examples are corrupt. The message names one of them.
    """
    plan = plan_batches(source, options)
    if states is not None:
        return _stored_batches(_Stored(source.labels, states), plan)
    channels = _channels(Readable(source, max_corrupt), image_size, preparation)

    def padded_batch(step: int) -> Batch:
        start = step * plan.rows + plan.process_index * plan.batch_size
        batch: Batch = {
            "image": np.zeros((plan.batch_size, image_size, image_size, channels), np.float32),
            "label": np.zeros(plan.batch_size, np.int32),
            "mask": np.zeros(plan.batch_size, bool),
            "index": np.full(plan.batch_size, -1, np.int32),
            "corrupt": [],
        }
        for row, index in enumerate(range(start, min(start + plan.batch_size, len(source)))):
            try:
                example = source[index]
            except CorruptExampleError as error:
                batch["corrupt"].append(str(error))
                continue
            batch["image"][row] = eval_image(example["image"], image_size, preparation)
            batch["label"][row] = example["label"]
            batch["mask"][row] = True
            batch["index"][row] = index
        return batch

    batches = grain.MapDataset.range(plan.steps(len(source))).map(padded_batch)
    return EvalBatches(len(source), batches, plan.read_options, max_corrupt)


@dataclass(frozen=True)
class _Stored:
    """A sequence of examples that have stored states instead of images."""

    labels: Int[np.ndarray, "n"]
    states: States

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.states.rows[index], "label": self.labels[index], "corrupt": {}}


def _stored_batches(source: _Stored, plan: BatchPlan) -> EvalBatches:
    """Return batches for evaluation, as `eval_batches` does, that have stored states instead of images."""

    def batch(step: int) -> Batch:
        start = step * plan.rows + plan.process_index * plan.batch_size
        index = np.arange(start, start + plan.batch_size)
        kept = index[index < len(source)]
        padding = plan.batch_size - len(kept)
        return {
            "image": source.states.take(kept, padding=padding),
            "label": np.pad(source.labels[kept], (0, padding)).astype(np.int32),
            "mask": index < len(source),
            "index": np.where(index < len(source), index, -1).astype(np.int32),
        }

    return EvalBatches(len(source), grain.MapDataset.range(plan.steps(len(source))).map(batch), plan.read_options)


def _train_example(
    example: dict[str, Any],
    rng: np.random.Generator,
    *,
    image_size: int,
    augment: Augment,
    preparation: Preparation,
) -> dict[str, Any]:
    image = train_image(example["image"], rng, image_size=image_size, augment=augment, preparation=preparation)
    return {**example, "image": image}


def _stacked(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
        "corrupt": {index: why for example in examples for index, why in example["corrupt"].items()},
    }


def _channels(source: Readable, image_size: int, preparation: Preparation) -> int:
    """Return the number of channels of the prepared images. The first readable image is prepared to find it."""
    if image_size < 1:
        raise UserError(f"image_size is {image_size}, but must be at least 1")
    return eval_image(source[0]["image"], image_size, preparation).shape[-1]
