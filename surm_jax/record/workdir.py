"""The folder of a run, its lock against other processes, and its JSON files.

In this file, a configuration is a nested dictionary of JSON values, made by `surm_jax.training.parsing.to_dict`.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from surm_jax.atomic import is_temporary, replacing
from surm_jax.errors import UserError
from surm_jax.files import read_json

CONFIG_NAME = "config.json"
RESULT_NAME = "result.json"
LOCK_NAME = ".lock"
INPUTS_NAME = "inputs.json"

Tree = Mapping[str, Any]
Check = Callable[[Tree], Tree]
"""A function that takes a configuration and returns it with default values for missing keys. It raises a `UserError` if
a key or a value is wrong."""

CHANGEABLE = (
    "data.name",
    "data.dir",
    "data.cache",
    "data.eval_batch_size",
    "model.checkpoint",
    "model.scan_layers",
    "model.remat",
    "mesh.data",
    "mesh.fsdp",
)
"""The configuration keys whose values may change when a run is resumed, evaluated or exported.

They give the places of data and weights, and settings that change the results only by rounding. What is read from
another place is compared with what the run has read: data by `surm_jax.record.inputs`, and weights by the fingerprint
of the run's base model.
"""


def default_workdir(config_name: str, overrides: Mapping[str, object]) -> Path:
    """Return the default folder of a run, `runs/<name>`.

    The name is that of the configuration file, followed by the values given on the command line. Values that may change
    without changing the run (`CHANGEABLE`) are left out, except for `data.name` and `model.checkpoint`.

    >>> default_workdir("digits", {"peft.method": "lora", "seeds": (0, 1), "data.dir": "/data"}).as_posix()
    'runs/digits,peft.method=lora,seeds=(0,1)'
    """
    named = ("data.name", "model.checkpoint")
    telling = [key for key in sorted(overrides) if key in named or key not in CHANGEABLE]
    text = ",".join([config_name, *(f"{key}={overrides[key]}" for key in telling)]).replace(" ", "")
    name = re.sub(r"[^\w.,=()+-]", "_", text)[:150]
    # A name that was shortened or changed may not be unique: append a hash.
    return Path("runs") / (name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


@contextlib.contextmanager
def open_workdir(workdir: Path, config: Tree, check: Check) -> Iterator[None]:
    """Make the folder of a run, or check that it belongs to this run. Lock it while the `with` block runs.

    The first start of a run saves its configuration in the folder. Later starts must have the same configuration,
    except for the keys in `CHANGEABLE`. A folder that holds only a configuration and a record of inputs may be used by
    any run, because the run that wrote them failed before its first step.

    Args:
        workdir: The folder.
        config: The configuration of the run.
        check: A function that checks the configuration in the folder and adds missing keys.

    Raises:
        UserError: The folder cannot be written, another process uses it, or it holds another run or other files.
    """
    _require_writable(workdir)
    with locked(workdir):
        files = [path for path in workdir.rglob("*") if path.is_file() and not is_temporary(path)]
        if all(path.name in (CONFIG_NAME, LOCK_NAME, INPUTS_NAME) for path in files):
            for path in files:
                if path.name == INPUTS_NAME:
                    path.unlink()
            save_config(workdir, config)
        else:
            _require_this_run(workdir, files, config, check)
        yield


def save_config(workdir: Path, config: Tree) -> None:
    """Write the configuration of a run into its folder."""
    write_json(workdir / CONFIG_NAME, config)


def _require_this_run(workdir: Path, files: Collection[Path], config: Tree, check: Check) -> None:
    if workdir / CONFIG_NAME not in files:
        raise UserError(f"{workdir} holds files but no run (no {CONFIG_NAME}): choose another folder")
    # If the run is complete, its weights are not loaded and checked. So do not return its result if the configuration
    # now gives another checkpoint.
    complete = any(path.name == RESULT_NAME for path in files)
    changeable = [key for key in CHANGEABLE if not (complete and key == "model.checkpoint")]
    if changes := config_changes(read_config(workdir, check), config, changeable):
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UserError(
            f"{workdir} holds another run; there {'; '.join(changes[:5])}{more}."
            " Choose another folder, or delete that one"
        )


def require_shared(workdir: Path) -> None:
    """Check that this process sees the folder that the first process of the run has opened.

    Raises:
        UserError: The processes do not share a file system.
    """
    if not (workdir / CONFIG_NAME).exists():
        raise UserError(
            f"{platform.node()} does not see the run in {workdir.absolute()}: all processes need the same folder, on a"
            " file system that they share"
        )


def relocated(config: Tree, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a run's configuration with new values, such as other places of data and weights.

    Args:
        config: The configuration of the run.
        overrides: New values by dotted key, such as "data.dir".

    Raises:
        UserError: A key that is not in `CHANGEABLE` would get another value.
    """
    tree = jsonable(config)
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, tree)
        if key not in CHANGEABLE and section[name] != jsonable(value):
            raise UserError(
                f"config.{key} belongs to the run that is in the folder and cannot be changed now"
                f" (only {', '.join(CHANGEABLE)} can)"
            )
        section[name] = value
    return tree


def read_config(workdir: Path, check: Check) -> Tree:
    """Read the configuration of the run in a folder, check it, and add the default values of missing keys.

    Raises:
        UserError: There is no configuration, it is damaged, or `check` finds an error in it.
    """
    path = workdir / CONFIG_NAME
    if not path.exists():
        raise UserError(f"no run in {workdir}: there is no {path}")
    tree = read_json(path)
    try:
        return check(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_result(workdir: Path) -> dict[str, Any]:
    """Read the result of the run in a folder, from its file `result.json`.

    Raises:
        UserError: The run is not complete, or its result is damaged.
    """
    path = workdir / RESULT_NAME
    if not path.exists():
        raise UserError(
            f"the run in {workdir} is not complete (the training command goes on with it): there is no {path}"
        )
    return read_json(path)


def write_json(path: Path, tree: Tree) -> None:
    """Write a JSON object to a file, completely or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Try to write. The permissions of the folder do not say everything: the file system may be read-only or full,
        # or the user may be root.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except FileExistsError:
        raise UserError(f"the run's folder {folder} is a file: choose another folder") from None
    except NotADirectoryError:
        raise UserError(f"the run's folder {folder} lies below a file: choose another folder") from None
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be written ({error.strerror}): choose another folder"
        ) from None


def config_changes(old: Tree, new: Tree, changeable: Collection[str] = CHANGEABLE) -> list[str]:
    """Return one text for each key that differs between two configurations, without the keys in `changeable`.

    Each text gives the old value and, after the word "here", the new one. `data.dir` may change:

    >>> config_changes({"optim": {"steps": 9}, "data": {"dir": "a"}}, {"optim": {"steps": 8}, "data": {"dir": "b"}})
    ['config.optim.steps is 9, here 8']
    """
    ignored = tuple(f"config.{key} " for key in changeable)
    return [change for change in differences(old, new, "config") if not change.startswith(ignored)]


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """Yield one text for each value that differs between two nested dictionaries.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}}, "config"))
    ['config.a.b is 1, here 2']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}")
    elif jsonable(old) != jsonable(new):
        yield f"{path} is {jsonable(old)!r}, here {jsonable(new)!r}"


def jsonable(value: Any) -> Any:
    """Return a value as JSON gives it back: written and read again, so that tuples become lists."""
    return json.loads(json.dumps(value))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a run against all other processes while the `with` block runs.

    The lock is a lock of the operating system (`flock` on the file `<folder>/.lock`). It is released when the process
    ends, even if it is killed, so that nobody has to remove anything afterwards. Over NFS, Linux asks the server for
    the lock, so that it also holds between machines. On a file system without locks, this prints a warning and the
    folder is not protected.

    Args:
        folder: An existing folder.

    Raises:
        UserError: Another process has the lock. The message names the process and its host.

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
    """Open the lock file, lock it, and return it.

    If the previous owner removes the file between opening and locking, it is opened again.

    Raises:
        UserError: Another process has the lock.
    """
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
    except (ValueError, TypeError, KeyError):  # The owner has not yet written its name into the file.
        return "another process"
