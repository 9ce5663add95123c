"""The folder of a run: which run it belongs to, and the files that are written whole or not at all."""

import contextlib
import functools
import json
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from surm_jax.errors import UserError
from surm_jax.files import is_temporary, replacing
from surm_jax.record.lock import LOCK_NAME, locked
from surm_jax.training.config import RunConfig, parse, to_dict

CONFIG_NAME = "config.json"
RESULT_NAME = "result.json"


#: Where a run's data and weights are, and how it is computed, which changes numbers by their rounding alone: a run may
#: go on, be evaluated or exported elsewhere and on other devices. That the weights are the same is checked where they
#: are loaded.
CHANGEABLE = (
    "data.dir",
    "data.eval_batch_size",
    "model.checkpoint",
    "model.scan_layers",
    "model.remat",
    "mesh.data",
    "mesh.fsdp",
)


@contextlib.contextmanager
def open_workdir(workdir: Path, config: RunConfig) -> Iterator[None]:
    """Makes the folder of a run, or checks that it is the folder of this very run; no other process has it meanwhile.

    A folder with nothing but a configuration is free: that start failed before its first step. Where data and devices
    are is noted anew by each start, but not once there is a result: nothing shows then that they are there.

    Raises:
        UserError: if it cannot be written, another process is using it, or it holds another run or something else.
    """
    _require_writable(workdir)
    with locked(workdir):
        _require_this_run(workdir, config)
        if not (workdir / RESULT_NAME).exists():
            write_json(workdir / CONFIG_NAME, to_dict(config))
        yield


def _require_this_run(workdir: Path, config: RunConfig) -> None:
    files = [path for path in workdir.rglob("*") if path.is_file() and not is_temporary(path)]
    if all(path.name in (CONFIG_NAME, LOCK_NAME) for path in files):
        return
    if workdir / CONFIG_NAME not in files:
        raise UserError(f"{workdir} holds files but no run (no {CONFIG_NAME}): choose another folder")
    # Beside a result no weights are loaded, and it would pass for that of others.
    complete = any(path.name == RESULT_NAME for path in files)
    changeable = [key for key in CHANGEABLE if not (complete and key == "model.checkpoint")]
    if changes := config_changes(to_dict(read_config(workdir)), to_dict(config), changeable):
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UserError(
            f"{workdir} holds another run; there {'; '.join(changes[:5])}{more}."
            " Choose another folder, or delete that one"
        )


def require_shared(workdir: Path) -> None:
    """Checks that the folder of a run, which the first of several processes opened, is this one's as well.

    Raises:
        UserError: if it is on another file system.
    """
    if not (workdir / CONFIG_NAME).exists():
        raise UserError(
            f"{platform.node()} does not see the run in {workdir.absolute()}: all processes need the same folder, on a"
            " file system that they share"
        )


def locations(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration of a finished run with its data and weights at other places, or for other devices.

    Args:
        config: of the run.
        overrides: values by key, such as `data.dir`. Those that the run has anyway change nothing.

    Raises:
        UserError: for another value of a key that is not in `CHANGEABLE`: what a run was cannot be changed.
    """
    tree = to_dict(config)
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, tree)
        if key not in CHANGEABLE and _jsonable(section[name]) != _jsonable(value):
            raise UserError(
                f"config.{key} belongs to the run that is in the folder and cannot be changed now"
                f" (only {', '.join(CHANGEABLE)} can)"
            )
        section[name] = value
    return parse(tree)


def read_config(workdir: Path) -> RunConfig:
    """Reads the configuration of the run in a folder.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    tree = read_json(workdir / CONFIG_NAME, f"no run in {workdir}")
    try:
        return parse(tree)
    except UserError as error:
        raise UserError(f"{workdir / CONFIG_NAME}: {error}") from None


def read_json(path: Path, absent: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: if it cannot be read (the message begins with `absent`), or is damaged.
    """
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{absent}: cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return tree


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(tree, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell all (read-only mounts, full disks, root): try.
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


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], changeable: Collection[str] = CHANGEABLE
) -> list[str]:
    """Returns what differs between two configurations but for the keys in `changeable`, as text.

    >>> config_changes({"optim": {"steps": 9}, "data": {"dir": "a"}}, {"optim": {"steps": 8}, "data": {"dir": "b"}})
    ['config.optim.steps is 9, here 8']
    """
    ignored = [f"config.{key} " for key in changeable]
    return [change for change in differences(old, new, "config") if not change.startswith(tuple(ignored))]


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """Yields what differs between two configurations, as text.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}}, "config"))
    ['config.a.b is 1, here 2']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}")
    elif _jsonable(old) != _jsonable(new):
        yield f"{path} is {_jsonable(old)!r}, here {_jsonable(new)!r}"


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value))
