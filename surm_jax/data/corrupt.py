"""Skip examples that cannot be read, such as a record whose image does not decode, up to a limit."""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

from surm_jax.errors import UserError


class CorruptExampleError(UserError):
    """The error for one example that cannot be read; other examples of its source may be readable."""


class Examples(Protocol):
    """A random-access sequence of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Readable:
    """A source that replaces each corrupt example by the next readable one.

    The replacement depends only on the source. Other examples keep their places and their indices, for any number of
    processes and after a run is resumed.

    `source[i]` has an additional entry `"corrupt"`, which maps the index of each example that was skipped for it to the
    reason why that example cannot be read.

    Attributes:
        source: All examples.
        max_corrupt: Number of examples that may be skipped.

    Raises:
        CorruptExampleError: On reading, if more than `max_corrupt` examples in a row are corrupt, or if none can be
            read.
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
        CorruptExampleError: More than `max_corrupt` examples were skipped.
    """
    if so_far > max_corrupt:
        raise one_too_many(why, max_corrupt)
    warnings.warn(f"skipped: {why}", stacklevel=2)


def one_too_many(why: str, max_corrupt: int) -> CorruptExampleError:
    """Return the error for more corrupt examples than `max_corrupt`."""
    return CorruptExampleError(f"{why}; max_corrupt lets {max_corrupt} such examples be skipped")
