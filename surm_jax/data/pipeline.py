"""Batches for training and evaluation, made by grain in threads that read ahead of the device.

Both directions share one rule: the batches that `process_count` processes make of `batch_size` examples each are, put
together, the batch that one process would make of `process_count * batch_size` examples. So the number of hosts changes
neither what a training step sees nor what an evaluation counts. Only threads are used: Pillow and numpy release the
interpreter lock for the heavy part, and there is no worker process to start, to feed or to lose.
"""

import functools
import typing
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from surm_jax.data.dataset import ImageSource
from surm_jax.data.image_transforms import Augment, eval_image, normalize, train_image
from surm_jax.errors import UserError, did_you_mean

Batch = dict[str, np.ndarray]
MeanAndStd = tuple[Sequence[float], Sequence[float]]


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    augment: Augment,
    seed: int,
    normalization: MeanAndStd | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    read_ahead: int = 4,
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over shuffled, augmented batches.

    Every epoch visits every example once, in a new order and with new augmentation, both fixed by `seed` alone. Epochs
    follow each other without a gap: a batch may span two (or, if larger than the set, several), and no example is
    dropped.

    The iterator is resumable: `get_state()` is a small JSON-able dict that counts the batches handed out, not those
    read ahead, and `set_state` on an iterator of the same arguments continues with the very next batch. orbax saves and
    restores grain iterators as they are.

    Args:
        source: Labelled images, (height, width, channels) each; sizes may differ, the number of channels may not.
        batch_size: Examples per batch of this process.
        image_size: Height and width of the images in the batch.
        augment: "crop_flip", "affine" or "none", see `train_image`.
        seed: Non-negative; order and augmentation follow from it.
        normalization: Mean and standard deviation of each channel, of pixels in [0, 1]; `None` leaves [-1, 1].
        process_index: This process, of `process_count`. Processes read disjoint examples.
        process_count: Number of processes that take batches in step.
        threads: Batches made at the same time.
        read_ahead: Batches begun or finished, and held in memory, before they are asked for; 0 makes each on demand.

    Returns:
        An iterator of `{"image": float32 (batch_size, image_size, image_size, channels), "label": int32
        (batch_size,)}`.

    Raises:
        UserError: an argument is out of range, or the source is empty.
    """
    check_batches(
        source,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        read_ahead=read_ahead,
    )
    _channels(source, image_size)
    if augment not in (modes := typing.get_args(Augment)):
        raise UserError(
            f"augment is {augment!r}, but must be one of {', '.join(modes)}{did_you_mean(str(augment), modes)}"
        )
    if seed < 0:
        raise UserError(f"seed is {seed}, but must be non-negative")
    augmented = functools.partial(_train_example, image_size=image_size, augment=augment, normalization=normalization)
    examples = grain.MapDataset.source(source).seed(seed).shuffle().random_map(augmented).repeat()
    # Sliced after the shuffle, so that processes share one order and one numbering of random generators. Elements are
    # lazy: no process reads what another one uses.
    batches = examples[process_index::process_count].batch(batch_size)
    return iter(batches.to_iter_dataset(read_options(threads, read_ahead)))


@dataclass(frozen=True)
class EvalBatches:
    """A pass over all examples, as often as it is iterated; made by `eval_batches`. `len()` counts the batches."""

    _batches: grain.MapDataset[Batch]
    _options: grain.ReadOptions

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.to_iter_dataset(self._options))


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    normalization: MeanAndStd | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    read_ahead: int = 4,
) -> EvalBatches:
    """Returns batches that hold every example exactly once, in order; each pass starts anew.

    What is left over is padded, never dropped. Every process yields the same number of batches, `ceil(n / (batch_size *
    process_count))`, so that collective operations stay in step; some of a process's batches may be padding throughout.

    Args:
        source: Labelled images.
        batch_size: Examples per batch of this process.
        image_size: Height and width of the images in the batch.
        normalization: As in `train_batches`.
        process_index: This process, of `process_count`.
        process_count: Number of processes that take batches in step.
        threads: Batches made at the same time.
        read_ahead: Batches begun or finished, and held in memory, before they are asked for; 0 makes each on demand.

    Returns:
        An iterable of `{"image": float32 (batch_size, image_size, image_size, channels), "label": int32
        (batch_size,), "mask": bool (batch_size,)}`; where the mask is False the image and the label are zeros.

    Raises:
        UserError: an argument is out of range, or the source is empty.
    """
    check_batches(
        source,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        read_ahead=read_ahead,
    )
    channels = _channels(source, image_size)

    def padded_batch(step: int) -> Batch:
        start = (step * process_count + process_index) * batch_size
        batch = {
            "image": np.zeros((batch_size, image_size, image_size, channels), np.float32),
            "label": np.zeros(batch_size, np.int32),
            "mask": np.zeros(batch_size, bool),
        }
        for row, index in enumerate(range(start, min(start + batch_size, len(source)))):
            example = source[index]
            image = eval_image(example["image"], image_size)
            batch["image"][row] = normalize(image, *normalization) if normalization else image
            batch["label"][row] = example["label"]
            batch["mask"][row] = True
        return batch

    steps = -(-len(source) // (batch_size * process_count))
    return EvalBatches(grain.MapDataset.range(steps).map(padded_batch), read_options(threads, read_ahead))


def _train_example(
    example: dict[str, Any],
    rng: np.random.Generator,
    *,
    image_size: int,
    augment: Augment,
    normalization: MeanAndStd | None,
) -> Batch:
    image = train_image(example["image"], rng, image_size=image_size, augment=augment)
    if normalization:
        image = normalize(image, *normalization)
    return {"image": image, "label": np.asarray(example["label"], np.int32)}


def read_options(threads: int, read_ahead: int) -> grain.ReadOptions:
    """Returns grain's options for so many batches made at the same time and ahead of time."""
    # More threads than batches ahead would idle, and grain warns about them.
    return grain.ReadOptions(num_threads=min(threads, read_ahead), prefetch_buffer_size=read_ahead)


def check_batches(
    source: Sized, *, batch_size: int, process_index: int, process_count: int, threads: int, read_ahead: int
) -> None:
    """Checks what all pipelines share.

    Raises:
        UserError: an argument is out of range, or the source is empty.
    """
    for name, value in {"batch_size": batch_size, "process_count": process_count, "threads": threads}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
    if read_ahead < 0:
        raise UserError(f"read_ahead is {read_ahead}, but must be at least 0")
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index is {process_index}, but must be 0 to {process_count - 1}")
    if not len(source):
        raise UserError("the data source is empty: there is nothing to make batches of")


def _channels(source: ImageSource, image_size: int) -> int:
    """Checks the size of the images in a batch, and returns the number of channels of the first image."""
    if image_size < 1:
        raise UserError(f"image_size is {image_size}, but must be at least 1")
    shape = np.shape(source[0]["image"])
    if len(shape) != 3:
        raise UserError(f"the first image has shape {shape}, but images must be (height, width, channels)")
    return shape[-1]
