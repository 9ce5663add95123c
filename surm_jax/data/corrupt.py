"""Skip corrupt examples up to a limit.

An example is corrupt if it cannot be read, for instance because its image cannot be decoded.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

from surm_jax.errors import UserError


class CorruptExampleError(UserError):
    """One example cannot be read. Other examples of its source may be readable."""


class Examples(Protocol):
    """The interface of a random-access sequence of examples. Each example is a dictionary."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Readable:
    """A sequence of examples in which each corrupt example of a source is replaced by the next readable one.

    After the last example, the search continues with the first. Readable examples keep their indices, and the
    replacement depends only on the source. So the examples are the same for any number of processes and after a run is
    resumed.

    Each example gets an entry `"corrupt"`. It maps the indices of the corrupt examples that were skipped to find this
    example to the reasons why they cannot be read.

    Attributes:
        source: All examples, including corrupt ones.
        max_corrupt: The number of corrupt examples that may be skipped to find a readable one.

    Raises:
        CorruptExampleError: When an example is read, if more than `max_corrupt` examples in a row are corrupt, or if no
            example of the source can be read.
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
    """Count one more corrupt example: warn that it is skipped, or raise an error if that is one too many.

    Args:
        why: The reason why the example cannot be read, which names the example.
        so_far: The number of examples that were skipped so far, including this one.
        max_corrupt: The number of examples that may be skipped.

    Raises:
        CorruptExampleError: More than `max_corrupt` examples were skipped.
    """
    if so_far > max_corrupt:
        raise one_too_many(why, max_corrupt)
    warnings.warn(f"skipped: {why}", stacklevel=2)


def one_too_many(why: str, max_corrupt: int) -> CorruptExampleError:
    """Return the error for a corrupt example that exceeds the limit `max_corrupt`.

    Args:
        why: The reason why the example cannot be read, which names the example.
        max_corrupt: The number of examples that may be skipped.
    """
    return CorruptExampleError(f"{why}; max_corrupt lets {max_corrupt} such examples be skipped")
