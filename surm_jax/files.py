"""Safe reading of untrusted files.

Reading a file never executes code from it. Before memory is allocated for an array or a JSON file, its size is checked.
If a file is damaged, the functions raise a `UserError` that names the file.
"""

import json
import math
import os
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
# A compressed file is refused if its arrays need more than 2^28 bytes plus a hundred times the size of the file. A file
# that is made to fill the memory (a compression bomb) unpacks to about a thousand times its size. A small data set of
# images with large areas of one colour may do so, too. Therefore arrays of up to 2^28 bytes are always allowed.
_MOST_UNPACKED, _UNPACKED_IN_ANY_CASE = 100, 2**28
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def require_file(path: Path) -> int:
    """Check that a path is a regular file, and return the size of the file in bytes.

    Raises:
        UserError: The file does not exist, its status cannot be read, or it is not a regular file. Pipes and devices
            are not regular files. They are refused because reading them might never end.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is not a regular file")
    return status.st_size


def read_json(path: Path, most_bytes: int = _MOST_BYTES_OF_JSON) -> dict[str, Any]:
    """Read a JSON file that holds one JSON object, and return it as a dictionary.

    Args:
        path: The file.
        most_bytes: Largest size of the file in bytes.

    Raises:
        UserError: The file cannot be read, is too large, does not hold a JSON object, or has a key twice in the same
            object.
    """
    if (size := require_file(path)) > most_bytes:
        raise UserError(f"{path} has {size:,} bytes, but such a file may have at most {most_bytes:,}")
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
    """Return whether an array contains neither NaN nor infinity, without allocating an array of booleans.

    The function computes the sum of the entries in float64, which is NaN or infinite if an entry is. In a float64 array
    with entries near the largest float64, the sum may overflow. Then the result is False, although all entries are
    finite.

    >>> is_finite(np.ones(3, np.float16)), is_finite(np.array([1.0, np.inf, -np.inf], np.float32))
    (True, False)
    """
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(np.sum(array, dtype=np.float64)))


@dataclass(frozen=True)
class Npz:
    """An open `.npz` file, which `open_npz` yields.

    Attributes:
        keys: The names of the arrays in the file.
        read: Function that reads the array with a given name from the file and returns it.
    """

    keys: Sequence[str]
    read: Callable[[str], np.ndarray]


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Open an `.npz` file, a zip archive of named NumPy arrays, to read its arrays one at a time.

    Raises:
        UserError: The file is missing or damaged, is a pickle file, holds the same name twice, or would unpack to more
            than 256 MiB plus a hundred times its size. `Npz.read` raises a `UserError`, too, if the array is damaged or
            holds pickled objects.
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
        if dtype.kind == "V" and dtype.names is None and dtype.subdtype is None:
            raise UserError(
                f"{path}: {member.filename.removesuffix('.npy')} is {dtype}, because .npz files have no name for its"
                " dtype, such as bfloat16: store it as float32"
            )
        # An array of empty strings has zero bytes for any shape, so a tiny file could declare a huge one. Refuse it.
        if not dtype.itemsize or math.prod(shape) * dtype.itemsize != there:
            raise ValueError(f"{member.filename} has {there} bytes for an array of shape {shape} and type {dtype}")
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _pickled(path: Path) -> UserError:
    return UserError(f"{path} holds pickled objects, which are not loaded: loading them could run any code")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn the exceptions of zipfile, its decompressors and NumPy within the `with` block into `UserError`s."""
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


def cache_root() -> Path:
    """Return the folder for downloaded files and compiled programs.

    It is the value of the environment variable `SURM_JAX_CACHE`, or `~/.cache/surm_jax` if this is not set.
    """
    return Path(os.environ.get("SURM_JAX_CACHE") or Path.home() / ".cache" / "surm_jax").expanduser()
