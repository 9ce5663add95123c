"""Writing of files and folders so that each is either complete or not changed.

The content is written under a temporary name first. It gets its final name only after it is on the disk. So if the
process is killed or the power fails, no incomplete file has the final name.

What is already there keeps its nature. A symbolic link stays a link, and its target is replaced. A file keeps its
permissions. A folder stays the same folder, so that it may be a mount point or the current directory of a process.
Pipes and devices are written to.
"""

import errno
import os
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIXES = (".tmp", ".old")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that it is either complete or not changed at all.

    This context manager yields the path of an empty temporary file in the same folder, which the `with` block fills.
    When the block succeeds, the temporary file is renamed to `path` and replaces the file that was there before, if
    any. If the block raises an exception, the temporary file is removed, and `path` is not changed. Missing parent
    folders are created. The content is synced to the disk (fsync) before the file is renamed, and the folder is synced
    afterwards.

    A pipe, a device, a file that is a mount point, and a file to which the standard output or error of this process
    goes are not replaced. When the block succeeds, the content is written to them.

    Raises:
        OSError: The file is write-protected or cannot be written. If the error has no file name, as the one for a full
            disk, or names the temporary file, it gets the name `path`.
    """
    with _naming(path):
        before = _status(path)
        if before is not None and _is_written_through(path, before):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder, "content")
                temporary.touch()
                yield temporary
                _copy(temporary, path)
            return
        real = Path(os.path.realpath(path))
        real.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(real)
        try:
            temporary.touch()
            _keep_permissions(before, temporary)
            yield temporary
            _keep_permissions(before, temporary)  # The block may have put another file in the place of this one.
            _sync(temporary)
            try:
                os.replace(temporary, real)
            except OSError as error:
                if error.errno != errno.EBUSY:  # The file is a mount point.
                    raise
                _copy(temporary, real)
            _sync(real.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, last: str) -> Iterator[Path]:
    """Write the files of a folder so that the folder is complete as long as it holds the file `last`.

    This context manager yields an empty temporary folder, in which the `with` block writes files. If the block raises
    an exception, the temporary folder is removed, and `folder` is not changed. When the block succeeds, and there is no
    `folder` yet, the temporary folder is renamed to it. If there is one, it stays, and its files are replaced: The file
    `last` is removed first and comes back last. All other files of the folder are removed.

    Args:
        folder: The folder. Missing parent folders are created.
        last: The name of a file that the block writes. A reader must refuse a folder without this file.

    Raises:
        OSError: The folder cannot be written. The names in the error are as in `replacing`.
    """
    with _naming(folder):
        real = Path(os.path.realpath(folder))
        temporary = _beside(real / last if real.is_dir() else real)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _sync_all(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if real.is_dir():
            _refill(real, temporary, last)
        else:
            os.replace(temporary, real)
            _sync(real.parent)


def _refill(folder: Path, temporary: Path, last: str) -> None:
    """Replace the files of a folder by those of a temporary folder, and remove that."""
    marker, aside = folder / last, _beside(folder / last)
    with suppress(FileNotFoundError):
        os.replace(marker, aside)
    written = {path.name for path in temporary.iterdir()}
    for path in [path for path in folder.iterdir() if path.name not in written and not is_temporary(path)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in sorted(written, key=lambda name: (name == last, name)):
        with replacing(aside if name == last else folder / name) as new:
            os.replace(temporary / name, new)
    os.replace(aside, marker)
    _sync(folder)
    temporary.rmdir()


def move_folder(temporary: Path, folder: Path) -> None:
    """Rename a complete temporary folder to its final name, and remove an older folder of that name.

    `os.replace` cannot replace a folder that has content. Therefore the older folder is first renamed to a temporary
    name that ends in `.old`, and it is removed last. If the process is killed between the two renamings, no folder has
    the final name. In this case `remove_temporaries` gives the older folder its name back.

    Args:
        temporary: The path of the complete folder.
        folder: The final path. It must be in the same parent folder.
    """
    _sync_all(temporary)
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
    """Give `path` as the file name to an `OSError` of the `with` block that has none or names a temporary file."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or is_temporary(Path(os.fsdecode(error.filename)))
        # An OSError without an error number (errno) keeps its message as it is. If a file name were added, Python would
        # not show this message any more.
        if unnamed and error.errno is not None:
            error.filename = str(path)
            del error.filename2  # Python would show the value None, too.
        raise


def _status(path: Path) -> os.stat_result | None:
    """Return the status of the file that a path leads to, or None if there is nothing.

    Raises:
        OSError: It is a folder or a file that must not be written, or the path cannot be followed.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return status


def _is_written_through(path: Path, status: os.stat_result) -> bool:
    return not stat.S_ISREG(status.st_mode) or _descriptor(status) is not None


def _descriptor(status: os.stat_result) -> int | None:
    """Return 1 or 2 if the standard output or error goes to the file of this status, otherwise None."""
    for number in (1, 2):
        with suppress(OSError):  # The descriptor may be closed.
            if os.path.samestat(os.fstat(number), status):
                return number
    return None


def _copy(source: Path, target: Path) -> None:
    """Write the content of a file to another file, which may be the standard output or error."""
    descriptor = _descriptor(target.stat())
    if descriptor is not None and sys.stdout is not None:
        sys.stdout.flush()
    with (
        source.open("rb") as content,
        open(target if descriptor is None else descriptor, "wb", closefd=descriptor is None) as file,
    ):
        shutil.copyfileobj(content, file)


def _keep_permissions(before: os.stat_result | None, path: Path) -> None:
    """Give a file the mode of the file that it replaces, and its group and owner if this process may do so."""
    if before is None:
        return
    for owner in ((-1, before.st_gid), (before.st_uid, -1)):
        with suppress(OSError):
            os.chown(path, *owner)
    path.chmod(stat.S_IMODE(before.st_mode))


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until the content of a file is on the disk (fsync). The content of a folder is the list of names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    # The name of the temporary file must not be longer than the system allows if that of the file is not.
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}.tmp")
