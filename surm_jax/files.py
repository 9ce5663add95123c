"""Safe writing of files and folders, and safe reading of untrusted files.

A file or folder is written under a temporary name. It gets its final name only after its content is on the disk. So if
the process is killed or the power fails, no incomplete file has the final name.

Reading a file never executes code from it. Before memory is allocated for an array or a JSON file, its size is checked.
If a file is damaged, the functions raise a `UserError` that names the file.
"""

import json
import math
import os
import shutil
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surm_jax.errors import UserError

_SUFFIXES = (".tmp", ".old")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that it is either complete or not changed at all.

    This context manager yields a temporary path in the folder of `path`. The `with` block must write a file there. When
    the block succeeds, this file is renamed to `path` and replaces the file that was there before, if any. If the block
    raises an exception, the temporary file is removed, and `path` is not changed. Missing parent folders are created.

    The content is synced to the disk (fsync) before the file is renamed, and the folder is synced afterwards. If the
    block raises an `OSError` without a file name, such as the error for a full disk, `path` is added as its file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with _naming(path):
            yield temporary
            _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Write a folder so that it is complete before it gets its final name.

    This context manager yields an empty temporary folder, in which the `with` block writes files. When the block
    succeeds, `move_folder` renames the temporary folder to `folder` and removes an older folder of this name. If the
    block raises an exception, the temporary folder is removed. If `folder` is a symbolic link, the folder that it
    points to is replaced.
    """
    folder = folder.resolve()  # Renaming would rename the link itself, and `.` has no name.
    temporary = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        with _naming(folder):
            yield temporary
        move_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(temporary: Path, folder: Path) -> None:
    """Rename a complete temporary folder to its final name, and remove an older folder of that name.

    `os.replace` cannot replace a folder that has content. Therefore the older folder is first renamed to a temporary
    name that ends in `.old`, and it is removed last. If the process is killed between the two renamings, no folder has
    the final name. In this case `remove_temporaries` gives the older folder its name back.

    Args:
        temporary: The path of the complete folder.
        folder: The final path. It must be in the same parent folder.
    """
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    old = _beside(folder).with_suffix(".old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    _sync(folder.parent)
    if old.exists():
        remove_folder(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder and its content.

    The folder is first renamed to a temporary name. So if the process is killed during the removal, the remaining files
    are not mistaken for a complete folder.
    """
    temporary = _beside(folder)
    os.replace(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Return whether a file or folder has a temporary name of the form that this module uses.

    A process that is killed while it writes leaves a file or folder with such a name behind.
    """
    return path.name.startswith(".") and path.suffix in _SUFFIXES


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    A folder whose temporary name ends in `.old` is an older version that `move_folder` put aside. If nothing has its
    original name, it gets this name back and is not removed. Call this function only when no process writes to the
    folder.
    """
    for path in filter(is_temporary, list(folder.iterdir())):
        # A temporary name is .NAME.RANDOM.old or .NAME.RANDOM.tmp, with a random hexadecimal number.
        name = path.name[1:].rsplit(".", 2)[0]
        if path.suffix == ".old" and not (folder / name).exists():
            os.replace(path, folder / name)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # An OSError without an error number (errno) keeps its message as it is. If a file name were added, Python would
        # not show this message any more.
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _sync(path: Path) -> None:
    """Wait until the content of a file is on the disk (fsync). The content of a folder is the list of names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


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
        # An array of empty strings has zero bytes for any shape, so a tiny file could declare a huge one. Refuse it.
        if not dtype.itemsize or math.prod(shape) * dtype.itemsize != there:
            raise ValueError(f"{member.filename} has {there} bytes for an array of shape {shape} and type {dtype}")
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _pickled(path: Path) -> UserError:
    return UserError(f"{path} holds pickled objects, which are not loaded: loading them could run any code")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn any exception of zipfile, its decompressors and NumPy into a `UserError` that names the file."""
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
