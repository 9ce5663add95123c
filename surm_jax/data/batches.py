"""Iterators over batches, for the pipelines of images and of text, and checks of their arguments.

With several JAX processes, each process makes its own batch of `batch_size` examples in each step. Joined in the order
of the processes, these batches equal the batch of `process_count * batch_size` examples of a single process. So the
number of processes changes neither a training step nor an evaluation.

The library grain makes the batches in threads, before the device needs them. Worker processes are not needed, because
Pillow and numpy release Python's global interpreter lock while they compute.
"""

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import grain

from surm_jax.data.corrupt import skipping
from surm_jax.errors import UserError

Batch = dict[str, Any]
"""A batch: a dictionary of arrays by name, such as "image" and "label"."""


class TrainBatches:
    """An endless iterator over training batches that can be resumed.

    `train_batches` and `text_train_batches` return it.

    Attributes:
        corrupt: The indices of the corrupt examples that were skipped in the batches returned so far.
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
        """Return the position after the last returned batch, as a dictionary that can be written as JSON.

        Batches that were made ahead of time do not count.
        """
        corrupt = {"corrupt": sorted(self.corrupt)} if self.corrupt else {}
        return {**self._batches.get_state(), **corrupt}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position that `get_state` returned, also that of another iterator with the same arguments."""
        self.corrupt = set(state.get("corrupt", ()))
        self._batches.set_state({key: value for key, value in state.items() if key != "corrupt"})


@dataclass(frozen=True)
class EvalBatches:
    """An iterable over evaluation batches, which together hold every example once.

    It can be iterated several times. `len()` is the number of batches.

    Attributes:
        examples: The number of examples in the source, including corrupt examples, which are masked in the batches.
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


@dataclass(frozen=True)
class BatchPlan:
    """How batches are divided among processes and made ahead of time.

    Attributes:
        batch_size: The number of examples in each batch of this process.
        process_index: The index of this process, below `process_count`. Processes read disjoint examples.
        process_count: The number of processes. In each step, every process takes one batch of its own.
        threads: The number of batches that are made at the same time.
        read_ahead: The number of batches that are made ahead of time and held in memory. With 0, each batch is made
            when it is needed.

    Raises:
        UserError: A field is out of range.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1
    threads: int = 4
    read_ahead: int = 4

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "process_count": 1, "threads": 1, "read_ahead": 0}.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}, but must be at least {least}")
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process_index is {self.process_index}, but must be 0 to {self.process_count - 1}")

    @property
    def rows(self) -> int:
        """The number of examples that all processes together take in each step."""
        return self.batch_size * self.process_count

    @property
    def read_options(self) -> grain.ReadOptions:
        """The number of threads and of batches made ahead of time, as options of grain."""
        # Threads in excess of `read_ahead` would have nothing to do, and grain warns about them.
        return grain.ReadOptions(num_threads=min(self.threads, self.read_ahead), prefetch_buffer_size=self.read_ahead)

    def steps(self, examples: int) -> int:
        """Return the number of steps in which all processes together take this number of examples once."""
        return -(-examples // self.rows)


def plan_batches(source: Sized, options: Mapping[str, Any], seed: int = 0) -> BatchPlan:
    """Return the `BatchPlan` with the given fields, after checking the seed and that the source has examples.

    Raises:
        UserError: An option or the seed is out of range, or the source is empty.
    """
    plan = BatchPlan(**options)
    if seed < 0:
        raise UserError(f"seed is {seed}, but must be non-negative")
    if not len(source):
        raise UserError("the data source is empty: there is nothing to make batches of")
    return plan
