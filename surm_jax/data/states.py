"""The states of a model's frozen part, computed once for each example and stored in files.

A file holds the bytes of one array and, after them, their SHA-256. Its name is a digest of all that the states depend
on, so a file is never changed: it is written completely or not at all, and removed when newer files need its place.
Files are mapped into memory (mmap). The operating system keeps the parts in memory that are read often.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from surm_jax.atomic import is_temporary, replacing

MOST_BYTES = 2**34
"""The largest number of bytes that all files of states in a folder have together."""

_DIGEST = hashlib.sha256().digest_size
_DAY = 24 * 3600


@dataclass(frozen=True)
class States:
    """The stored states of the examples of a source.

    Attributes:
        rows: The states. Without `offsets`, `rows[i]` is the state of example i. With `offsets`, a state has a row for
            each token of the example, and no rows for padding.
        offsets: The indices in `rows` at which the examples start, and the number of all rows. Or None.
    """

    rows: Shaped[np.ndarray, "rows *state"]
    offsets: Int[np.ndarray, "n+1"] | None = None

    def take(
        self, indices: Int[np.ndarray, "n"], length: int | None = None, padding: int = 0
    ) -> Shaped[np.ndarray, "batch *state"]:
        """Return the states of the examples at `indices`, in this order.

        Args:
            indices: The indices of the examples.
            length: The number of tokens to which every state is padded with zeros. It has an effect only if there are
                `offsets`.
            padding: The number of states of zeros that follow.

        >>> States(np.arange(6), offsets=np.array([0, 2, 6])).take(np.array([1, 0]), length=5, padding=1)
        array([[2, 3, 4, 5, 0],
               [0, 1, 0, 0, 0],
               [0, 0, 0, 0, 0]])
        """
        lengths = () if self.offsets is None else (length,)
        taken = np.zeros((len(indices) + padding, *lengths, *self.rows.shape[1:]), self.rows.dtype)
        if self.offsets is None:
            taken[: len(indices)] = self.rows[indices]
            return taken
        for row, index in enumerate(indices):
            found = self.rows[self.offsets[index] : self.offsets[index + 1]]
            taken[row, : len(found)] = found
        return taken

    def put(self, indices: Int[np.ndarray, "n"], states: Shaped[np.ndarray, "n *state"]) -> None:
        """Store the states of the examples at `indices`, without their padding."""
        if self.offsets is None:
            self.rows[indices] = states
            return
        for index, state in zip(indices, states, strict=True):
            place = slice(self.offsets[index], self.offsets[index + 1])
            self.rows[place] = state[: place.stop - place.start]


def digest_of(*parts: np.ndarray | str) -> str:
    """Return a SHA-256 of the values, shapes and dtypes of arrays, and of texts."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part)} {part}".encode())
        else:
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def read_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """Return the array in a file, mapped into memory, after a check of all its bytes.

    Returns:
        The array, which cannot be written to. None if there is no such file, or if it is damaged. A damaged file is
        removed, and a warning names it.

    Raises:
        OSError: The file cannot be read.
    """
    count = _bytes(shape, dtype)
    try:
        content: np.ndarray = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        return None
    except ValueError:  # The file is empty.
        content = np.zeros(0, np.uint8)
    if len(content) != count + _DIGEST or hashlib.sha256(content[:count].data).digest() != content[count:].tobytes():
        warnings.warn(f"{path} is damaged, and is computed again", stacklevel=2)
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(path)  # The files that were used last are removed last.
    return np.asarray(content[:count]).view(dtype).reshape(shape)


@contextmanager
def writing_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield an array of zeros that the `with` block fills, and write it to a file.

    The place on the disk is reserved before the block, and older files in the same folder are removed for it. If the
    block raises an exception, there is no file.

    Raises:
        OSError: The disk has no place, or the file cannot be written.
    """
    count = _bytes(shape, dtype)
    _make_room(path.parent, count + _DIGEST)
    with replacing(path) as temporary:
        with temporary.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, count + _DIGEST)
        content = np.memmap(temporary, np.uint8, mode="r+")
        yield np.asarray(content[:count]).view(dtype).reshape(shape)
        content[count:] = np.frombuffer(hashlib.sha256(content[:count].data).digest(), np.uint8)
        content.flush()


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _make_room(folder: Path, count: int) -> None:
    """Remove the files of a folder that were not used for the longest time, so that `count` more bytes may be written.

    Unfinished files of other processes stay for a day, because these processes may still write to them.
    """
    if not folder.is_dir():
        return
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # Another process may remove it at the same time.
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = count + sum(size for _, size, _ in found)
    for modified, size, path in sorted(found):
        if is_temporary(path) and modified > time.time() - _DAY:
            continue
        if total > MOST_BYTES or is_temporary(path):
            path.unlink(missing_ok=True)
            total -= size
