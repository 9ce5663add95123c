"""Examples that cannot be read, such as a record whose image does not decode: skipped, named and counted to a limit."""

import warnings
from dataclasses import dataclass
from typing import Any

from surm_jax.data.images.dataset import ImageSource
from surm_jax.errors import UserError


class CorruptExampleError(UserError):
    """One example cannot be read; the others of its source can be."""


@dataclass(frozen=True)
class Readable:
    """A source in whose place for a corrupt example stands the next one that can be read.

    Which example that is depends on the source alone: the others keep their places and their numbers, on however many
    processes and however often a run is started again.

    `source[i]` has beside image and label the entry `"corrupt"`: why each example that was skipped for it cannot be
    read, by index.

    Attributes:
        source: All examples.
        max_corrupt: How many may be skipped.

    Raises:
        CorruptExampleError: (when read) of the first that is one too many, or of the last if none can be read.
    """

    source: ImageSource
    max_corrupt: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        corrupt: dict[int, str] = {}
        while True:
            place = (index + len(corrupt)) % len(self)
            try:
                return {**self.source[place], "corrupt": corrupt}
            except CorruptExampleError as error:
                corrupt[place] = str(error)
                if len(corrupt) > self.max_corrupt:
                    raise one_too_many(str(error), self.max_corrupt) from None
                if len(corrupt) == len(self):
                    raise


def skipping(why: str, so_far: int, max_corrupt: int) -> None:
    """Says that an example is skipped.

    Args:
        why: It cannot be read; names it.
        so_far: How many were skipped, this one included.
        max_corrupt: How many may be.

    Raises:
        CorruptExampleError: it is one too many.
    """
    if so_far > max_corrupt:
        raise one_too_many(why, max_corrupt)
    warnings.warn(f"skipped: {why}", stacklevel=2)


def one_too_many(why: str, max_corrupt: int) -> CorruptExampleError:
    """Returns the error that ends reading."""
    return CorruptExampleError(f"{why}; max_corrupt lets {max_corrupt} such examples be skipped")
