"""Batches for training and evaluation, made by grain in threads that read ahead of the device.

Both directions share one rule: the batches that `process_count` processes make of `batch_size` examples each are, one
below the other, the batch that one process would make of `process_count * batch_size` examples. So the number of hosts
changes neither what a training step sees nor what an evaluation counts. Only threads are used: Pillow and numpy release
the interpreter lock for the heavy part, and there is no worker process to start, to feed or to lose.
"""

import functools
import typing
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from surm_jax.data.images.corrupt import CorruptExampleError, Readable, skipping
from surm_jax.data.images.dataset import ImageSource
from surm_jax.data.images.transforms import Augment, eval_image, normalize, train_image
from surm_jax.errors import UserError, did_you_mean

Batch = dict[str, np.ndarray]
MeanAndStd = tuple[Sequence[float], Sequence[float]]


class TrainBatches:
    """An endless iterator over batches that can be resumed; made by `train_batches` and `text_train_batches`.

    Attributes:
        corrupt: The examples that cannot be read and were skipped in the batches handed out, by index.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], max_corrupt: int = 0):
        self.corrupt: set[int] = set()
        self._batches, self._max_corrupt = batches, max_corrupt

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        for index, why in batch.pop("corrupt", {}).items():
            if index not in self.corrupt:
                self.corrupt.add(index)
                skipping(why, len(self.corrupt), self._max_corrupt)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the place in the data as JSON values: the batches handed out are counted, not those read ahead."""
        corrupt = {"corrupt": sorted(self.corrupt)} if self.corrupt else {}
        return {**self._batches.get_state(), **corrupt}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that an iterator of the same arguments returned."""
        self.corrupt = set(state.get("corrupt", ()))
        self._batches.set_state({key: value for key, value in state.items() if key != "corrupt"})


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    augment: Augment,
    seed: int,
    normalization: MeanAndStd | None = None,
    max_corrupt: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    read_ahead: int = 4,
) -> TrainBatches:
    """Returns an endless iterator over shuffled, augmented batches.

    Every epoch visits every example once, in a new order and with new augmentation, both fixed by `seed` alone. Epochs
    follow each other without a gap: a batch may span two (or, if larger than the set, several), and no example is
    dropped.

    The iterator is resumable: `get_state()` is a small JSON-able dict, and `set_state` on an iterator of the same
    arguments continues with the very next batch.

    In the place of a corrupt example stands the next one of the source that can be read, so that nothing else changes;
    each is named once in a warning, and counted in `TrainBatches.corrupt` by the process that meets it.

    Args:
        source: Labelled images, (height, width, channels) each; sizes may differ, the number of channels may not.
        batch_size: Examples per batch of this process.
        image_size: Height and width of the images in the batch.
        augment: "crop_flip", "affine" or "none", see `train_image`.
        seed: Non-negative; order and augmentation follow from it.
        normalization: Mean and standard deviation of each channel, of pixels in [0, 1]; `None` leaves [-1, 1].
        max_corrupt: How many examples may be skipped because they cannot be read.
        process_index: This process, of `process_count`. Processes read disjoint examples.
        process_count: Number of processes that take batches in step.
        threads: Batches made at the same time.
        read_ahead: Batches begun or finished, and held in memory, before they are asked for; 0 makes each on demand.

    Returns:
        An iterator of `{"image": float32 (batch_size, image_size, image_size, channels), "label": int32
        (batch_size,)}`.

    Raises:
        UserError: an argument is out of range, the source is empty, or (from the iterator) an example is corrupt and
            one too many; the message names it.
    """
    check_batches(
        source,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        read_ahead=read_ahead,
    )
    readable = Readable(source, max_corrupt)
    _channels(readable, image_size)
    if augment not in (modes := typing.get_args(Augment)):
        raise UserError(
            f"augment is {augment!r}, but must be one of {', '.join(modes)}{did_you_mean(str(augment), modes)}"
        )
    if seed < 0:
        raise UserError(f"seed is {seed}, but must be non-negative")
    augmented = functools.partial(_train_example, image_size=image_size, augment=augment, normalization=normalization)
    examples = grain.MapDataset.source(readable).seed(seed).shuffle().random_map(augmented).repeat()

    def mine(place: int) -> dict[str, Any]:
        step, row = divmod(place, batch_size)
        return examples[(step * process_count + process_index) * batch_size + row]

    # Divided after the shuffle, so that processes share one order and one numbering of random generators. Elements are
    # lazy: no process reads what another one uses.
    batches = grain.MapDataset.range(len(examples) // process_count).map(mine)
    batches = batches.batch(batch_size, batch_fn=_stacked).to_iter_dataset(read_options(threads, read_ahead))
    return TrainBatches(iter(batches), max_corrupt)


@dataclass(frozen=True)
class EvalBatches:
    """A pass over all examples, as often as it is iterated; made by `eval_batches`. `len()` counts the batches.

    Attributes:
        examples: Number of examples in the source; corrupt ones are masked out of the batches.
    """

    examples: int
    _batches: grain.MapDataset[Batch]
    _options: grain.ReadOptions
    _max_corrupt: int = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        corrupt = 0
        for batch in self._batches.to_iter_dataset(self._options):
            for why in batch.pop("corrupt", ()):
                corrupt += 1
                skipping(why, corrupt, self._max_corrupt)
            yield batch


def eval_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    normalization: MeanAndStd | None = None,
    max_corrupt: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    read_ahead: int = 4,
) -> EvalBatches:
    """Returns batches that hold every example exactly once, in order; each pass starts anew.

    A corrupt example is masked out, and named in a warning.

    What is left over is padded, never dropped. Every process yields the same number of batches, `ceil(n / (batch_size *
    process_count))`, so that collective operations stay in step; some of a process's batches may be padding throughout.

    Args:
        source: Labelled images.
        batch_size: Examples per batch of this process.
        image_size: Height and width of the images in the batch.
        normalization: As in `train_batches`.
        max_corrupt: How many examples may be masked out because they cannot be read, in each process.
        process_index: This process, of `process_count`.
        process_count: Number of processes that take batches in step.
        threads: Batches made at the same time.
        read_ahead: Batches begun or finished, and held in memory, before they are asked for; 0 makes each on demand.

    Returns:
        An iterable of `{"image": float32 (batch_size, image_size, image_size, channels), "label": int32
        (batch_size,), "mask": bool (batch_size,)}`; where the mask is False the image and the label are zeros.

    Raises:
        UserError: an argument is out of range, the source is empty, or (from the iterator) an example is corrupt and
            one too many; the message names it.
    """
    check_batches(
        source,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        read_ahead=read_ahead,
    )
    channels = _channels(Readable(source, max_corrupt), image_size)

    def padded_batch(step: int) -> Batch:
        start = (step * process_count + process_index) * batch_size
        batch = {
            "image": np.zeros((batch_size, image_size, image_size, channels), np.float32),
            "label": np.zeros(batch_size, np.int32),
            "mask": np.zeros(batch_size, bool),
            "corrupt": [],
        }
        for row, index in enumerate(range(start, min(start + batch_size, len(source)))):
            try:
                example = source[index]
            except CorruptExampleError as error:
                batch["corrupt"].append(str(error))
                continue
            image = eval_image(example["image"], image_size)
            batch["image"][row] = normalize(image, *normalization) if normalization else image
            batch["label"][row] = example["label"]
            batch["mask"][row] = True
        return batch

    steps = -(-len(source) // (batch_size * process_count))
    batches = grain.MapDataset.range(steps).map(padded_batch)
    return EvalBatches(len(source), batches, read_options(threads, read_ahead), max_corrupt)


def _train_example(
    example: dict[str, Any],
    rng: np.random.Generator,
    *,
    image_size: int,
    augment: Augment,
    normalization: MeanAndStd | None,
) -> dict[str, Any]:
    image = train_image(example["image"], rng, image_size=image_size, augment=augment)
    if normalization:
        image = normalize(image, *normalization)
    return {**example, "image": image}


def _stacked(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
        "corrupt": {index: why for example in examples for index, why in example["corrupt"].items()},
    }


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


def _channels(source: Readable, image_size: int) -> int:
    """Checks the size of the images in a batch, and returns the number of channels of the first readable image."""
    if image_size < 1:
        raise UserError(f"image_size is {image_size}, but must be at least 1")
    shape = np.shape(source[0]["image"])
    if len(shape) != 3:
        raise UserError(f"the first image has shape {shape}, but images must be (height, width, channels)")
    return shape[-1]
