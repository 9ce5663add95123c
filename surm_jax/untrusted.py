"""Reading what anybody may have written: JSON, and the arrays of `.npz` files. Nothing in them is executed.

What a file takes in memory is known before it is taken, and damage of any kind is a `UserError` that names the file.
"""

import json
import math
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surm_jax.errors import UserError

_MOST_BYTES_OF_JSON = 2**24
# Images of one colour pack to a thousandth; so do bombs, but no data set of a size that matters.
_MOST_UNPACKED, _UNPACKED_IN_ANY_CASE = 100, 2**28
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def require_file(path: Path) -> int:
    """Returns the size of a file in bytes. Pipes and devices, which need not end, are no files.

    Raises:
        UserError: there is none, or it is something else.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is no file")
    return status.st_size


def read_json(path: Path, most_bytes: int = _MOST_BYTES_OF_JSON) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: there is no such file, it is too large, not JSON, not an object, or a name occurs twice in an object.
    """
    if (size := require_file(path)) > most_bytes:
        raise UserError(f"{path} has {size:,} bytes: too many for what it should be, at most {most_bytes:,}")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def is_finite(array: np.ndarray) -> bool:
    """Says whether an array holds neither NaN nor infinity, without an array of the answers.

    >>> is_finite(np.ones(3, np.float16)), is_finite(np.array([1.0, np.inf, -np.inf], np.float32))
    (True, False)
    """
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(np.sum(array, dtype=np.float64)))


@dataclass(frozen=True)
class Npz:
    """An open `.npz` file.

    Attributes:
        keys: the names of the arrays.
        read: returns the array of a name.
    """

    keys: Sequence[str]
    read: Callable[[str], np.ndarray]


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Opens an `.npz` file.

    Raises:
        UserError: now or on reading, if it is missing, damaged, holds pickled objects or a name twice, or would unpack
            to more than a hundred times its size.
    """
    size = require_file(path)
    with path.open("rb") as file:
        start = file.read(6)
        if start == b"\x93NUMPY":
            raise UserError(f"{path} holds a single array, not the named arrays of an .npz file")
        if start.startswith(b"\x80"):
            raise _pickled(path)
        with _damage(path):
            archive = zipfile.ZipFile(file)
        members = {}
        for member in archive.infolist():
            if (key := member.filename.removesuffix(".npy")) in members:
                raise UserError(f"{path} is damaged: it holds {key!r} twice")
            members[key] = member
        unpacked = sum(member.file_size for member in members.values())
        if unpacked > _MOST_UNPACKED * size + _UNPACKED_IN_ANY_CASE:
            raise UserError(f"{path} would unpack from {size:,} to {unpacked:,} bytes: it is not read")
        yield Npz(tuple(members), lambda key: _read(path, archive, members[key]))


def _read(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with _damage(path):
        with archive.open(member) as file:
            shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
            there = member.file_size - file.tell()
        if dtype.hasobject:
            raise _pickled(path)
        # Of strings without characters any number takes no bytes.
        if not dtype.itemsize or math.prod(shape) * dtype.itemsize != there:
            raise ValueError(f"{member.filename} has {there} bytes for an array of shape {shape} and type {dtype}")
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _pickled(path: Path) -> UserError:
    return UserError(f"{path} holds pickled objects, which are not loaded: loading them could run any code")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns whatever zipfile, its decompressors and NumPy raise into an error that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = str(error) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as an .npz file ({what}): it is damaged or incomplete, fetch or write it again"
        ) from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"it has {name!r} twice")
        content[name] = value
    return content
