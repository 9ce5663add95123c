"""One run at a time in a folder."""

import contextlib
import fcntl
import json
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from surm_jax.errors import UserError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run's folder while the block runs.

    The kernel holds the lock (`flock` on `<folder>/.lock`), and gives it back when the process ends, however it ends:
    a run that was killed leaves nothing behind that would have to be removed. Over NFS, Linux asks the server for the
    lock, which then holds between machines; where a file system has no locks there is a warning and no protection.

    Args:
        folder: must be there.

    Raises:
        UserError: if another process has it; the message says which, and on which host.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder)):
    ...     print(sorted(os.listdir(folder)))
    ['.lock']
    """
    path = folder / LOCK_NAME
    try:
        file = _open_current(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error.strerror}): take care that no other run uses it", stacklevel=3)
        yield
        return
    with file:
        file.truncate(0)
        json.dump({"process": os.getpid(), "host": platform.node()}, file)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_current(path: Path) -> TextIO:
    """Opens and locks the file of this name, which its last owner may be removing."""
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{path.parent} is in use by {_owner(file.read())}: wait for it, stop it, or choose another folder"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    stack.pop_all()
                    return file


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"the process {owner['process']} on {owner['host']}"
    except (ValueError, TypeError, KeyError):  # it has not written it yet
        return "another process"
