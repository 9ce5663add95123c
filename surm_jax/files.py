"""Writing of files that are complete or absent, and reading of untrusted files.

Writing: a file or folder gets its name only after its content is on the disk. So after a kill or a power loss, nothing
incomplete has this name. Reading: nothing in a file is executed, its size in memory is known before memory is
allocated, and any damage is a `UserError` that names the file.
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
    """Yield a temporary path beside `path`, and rename what is written there to `path` when the block succeeds.

    Missing parent folders are created. If the block fails, the temporary file is removed and `path` is unchanged. The
    content is synced to the disk before the file gets its name, and the name is synced before this function returns. An
    `OSError` in the block names the file; the system's error for a full disk would not.
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
    """Yield an empty temporary folder, and rename it to `folder` when the block succeeds.

    An existing folder cannot be replaced in one step: see `move_folder`. If `folder` is a link, its target is replaced.
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
    """Rename a complete folder to its final name, and replace a folder of that name if there is one.

    The old folder is renamed first and removed last. If the process dies in between, the old content is still there
    under a temporary name that ends in `.old`, and `remove_temporaries` renames it back.
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
    """Remove a folder. It is renamed first, so if the process dies, no half-removed folder has its name."""
    temporary = _beside(folder)
    os.replace(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Return whether a path has a temporary name, which a killed process leaves behind."""
    return path.name.startswith(".") and path.suffix in _SUFFIXES


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, and restore folders that they had moved away.

    Call this only when no process writes to the folder.
    """
    for path in filter(is_temporary, list(folder.iterdir())):
        # The temporary name is .NAME.RANDOM.old
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
        # An error without a number shows only its text. With a file name it would no longer show the text.
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


_MOST_BYTES_OF_JSON = 2**24
# A compression bomb unpacks to a thousand times its size. So may small sets of plain images, but no large sets.
_MOST_UNPACKED, _UNPACKED_IN_ANY_CASE = 100, 2**28
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def require_file(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        UserError: The file does not exist, or it is not a regular file: reading a pipe or a device might never end.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {path}: it is not a regular file")
    return status.st_size


def read_json(path: Path, most_bytes: int = _MOST_BYTES_OF_JSON) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        UserError: The file does not exist, is too large, or holds no JSON object, or an object in it has a name twice.
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
    """Return whether an array holds neither NaN nor infinity, without allocating an array of booleans.

    >>> is_finite(np.ones(3, np.float16)), is_finite(np.array([1.0, np.inf, -np.inf], np.float32))
    (True, False)
    """
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(np.sum(array, dtype=np.float64)))


@dataclass(frozen=True)
class Npz:
    """An open `.npz` file.

    Attributes:
        keys: The names of the arrays.
        read: Returns the array of a name.
    """

    keys: Sequence[str]
    read: Callable[[str], np.ndarray]


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Open an `.npz` file.

    Raises:
        UserError: The file is missing or damaged, holds pickled objects, holds one name twice, or is large and would
            unpack to more than a hundred times its size. Reading an array raises this error too.
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
        # An array of empty strings takes no bytes whatever its shape is, so it is refused.
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
    """Return the folder of downloads and compiled programs: `$SURM_JAX_CACHE`, or else `~/.cache/surm_jax`."""
    return Path(os.environ.get("SURM_JAX_CACHE") or Path.home() / ".cache" / "surm_jax").expanduser()
