"""Files and folders that are complete or absent, never half written."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there takes the place of `path` when the block succeeds.

    Folders above `path` are made. If the block fails, the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Does for a folder what `replacing` does for a file; yields an empty folder.

    A folder that is there cannot be replaced in one step: it is renamed first. Cut off between the two, its content is
    still there under a name that ends in `.old`.
    """
    temporary, old = _beside(folder), _beside(folder).with_suffix(".old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Says whether a path has a temporary name, left behind by a process that was killed while it wrote."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
