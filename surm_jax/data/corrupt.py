"""Examples that cannot be read, such as a record whose image does not decode: they are skipped up to a limit."""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

from surm_jax.errors import UserError


class CorruptExampleError(UserError):
    """One example cannot be read; the others of its source can be."""


class Examples(Protocol):
    """A random-access sequence of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Readable:
    """A source that replaces each corrupt example by the next readable one.

    The replacement depends only on the source. The other examples keep their places and their numbers, whatever the
    number of processes, and also after a run is resumed.

    `source[i]` has an additional entry `"corrupt"`: the indices of the examples that were skipped for it, each with the
    reason why it cannot be read.

    Attributes:
        source: All examples.
        max_corrupt: Number of examples that may be skipped.

    Raises:
        CorruptExampleError: On reading, if more examples than that are corrupt, or if no example can be read.
    """

    source: Examples
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
    """Warn that an example is skipped.

    Args:
        why: The reason why it cannot be read, which names the example.
        so_far: Number of examples that were skipped, including this one.
        max_corrupt: Number of examples that may be skipped.

    Raises:
        CorruptExampleError: This is one too many.
    """
    if so_far > max_corrupt:
        raise one_too_many(why, max_corrupt)
    warnings.warn(f"skipped: {why}", stacklevel=2)


def one_too_many(why: str, max_corrupt: int) -> CorruptExampleError:
    """Return the error that ends reading."""
    return CorruptExampleError(f"{why}; max_corrupt lets {max_corrupt} such examples be skipped")
