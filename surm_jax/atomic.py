"""Files and folders that are complete or absent, never half written: not after a kill, and not after a power loss."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIXES = (".tmp", ".old")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there takes the place of `path` when the block succeeds.

    Folders above `path` are made. If the block fails, the temporary file is removed and `path` stays as it was. The
    content is on the disk before it has its name, and the name before this returns. An `OSError` names a file, which a
    full disk alone does not.
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
    """Does for a folder what `replacing` does for a file; yields an empty folder.

    A folder that is there cannot be replaced in one step: see `move_folder`. Of a link, its target is replaced.
    """
    folder = folder.resolve()  # links are renamed as links, and `.` has no name
    temporary = _beside(folder)
    temporary.mkdir(parents=True)
    try:
        with _naming(folder):
            yield temporary
        move_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(temporary: Path, folder: Path) -> None:
    """Gives a complete folder its final name, in the place of a folder that may be there.

    The old one is renamed first, and removed last. Cut off between, its content is still there under a temporary name
    that ends in `.old`, and `remove_temporaries` gives it back its own.
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
    """Removes a folder so that, cut off at any moment, it is there as a whole or not under its name."""
    temporary = _beside(folder)
    os.replace(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Says whether a path has a temporary name, left behind by a process that was killed while it wrote."""
    return path.name.startswith(".") and path.suffix in _SUFFIXES


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left in a folder. Only for who knows that nobody writes there now.

    A folder that was to be replaced, and is not yet, has its name again afterwards.
    """
    for path in filter(is_temporary, list(folder.iterdir())):
        # .NAME.RANDOM.old
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
        # One without a number shows its text alone, which a file name would take the place of.
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
