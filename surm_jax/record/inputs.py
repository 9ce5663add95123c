"""The record of what a run has read: its data, label names, tokenizer, settings and plugins.

A run writes the record to `inputs.json` in its folder before its first step. Every later start, and every later command
on the run such as an evaluation, compares what it reads with the record. The weights of the base model are not in it.
Their arrays are compared instead (`surm_jax.peft.check_fingerprint`), because files of different formats may hold the
same weights.

The record holds absolute paths, which error messages show. Paths are not compared, so data can be moved or copied.
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surm_jax.errors import UserError
from surm_jax.files import read_json
from surm_jax.record.workdir import INPUTS_NAME, differences, write_json

WEIGHTS = "weights"
PLUGIN = "plugin "
Inputs = dict[str, Any]
"""What a run reads, by its name in error messages, such as "data". A value is a result of `describe_files`, or any
other value that JSON can represent."""

LARGEST_WHOLE = 10**9
_ALWAYS_WHOLE, _END = 2**20, 2**16
_HOW = (
    "Point to what the run has read (--config.data.name, --config.data.dir, --config.model.checkpoint), or train in"
    " another --workdir"
)


def describe_files(files: Sequence[Path]) -> dict[str, Any]:
    """Return the absolute path, the size and the SHA-256 of some files that together are one input.

    If the files have at most `LARGEST_WHOLE` bytes together, all bytes count, which takes up to a second. Otherwise,
    only the first and the last 64 KiB of each file above 1 MiB count. In an `.npz` file the last part holds a list of
    checksums. A file is read only once in each process unless it changes.

    Args:
        files: The files. If there are several, they are named relative to the folder that holds them all.

    Returns:
        A dictionary with the path under "path", and everything that is to be compared under "content".

    Raises:
        UserError: A file cannot be read.
    """
    paths = [path.absolute() for path in files]
    try:
        states = [path.stat() for path in paths]
        whole = sum(state.st_size for state in states) <= LARGEST_WHOLE
        texts = [
            _describe(path, state.st_size, state.st_mtime_ns, whole or state.st_size <= _ALWAYS_WHOLE)
            for path, state in zip(paths, states, strict=True)
        ]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    if len(paths) == 1:
        return {"path": str(paths[0]), "content": texts[0]}
    folder = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {"path": folder, "content": dict(sorted(zip(names, texts, strict=True)))}


@functools.lru_cache
def _describe(path: Path, size: int, modified: int, whole: bool) -> str:
    del modified  # It is only part of the key of the cache.
    with path.open("rb") as file:
        if whole:
            return f"{size:,} bytes, SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        digest = hashlib.sha256(file.read(_END))
        file.seek(-_END, os.SEEK_END)
        digest.update(file.read())
        return f"{size:,} bytes, SHA-256 of both ends {digest.hexdigest()[:16]}"


def keep_inputs(workdir: Path, inputs: Inputs) -> Inputs:
    """Write the record of what a run reads. If there already is a record, compare with it first.

    New paths replace those in the older record.

    Returns:
        The record.

    Raises:
        UserError: An input differs from the older record (see `check_inputs`).
    """
    started = str(Path.cwd())
    if (workdir / INPUTS_NAME).exists() or any(workdir.glob("checkpoints/*/checkpoint.json")):
        record = read_inputs(workdir)
        check_inputs(workdir, record, inputs)
        started = record.get("started in", started)
    record = {"started in": started, **inputs}
    write_json(workdir / INPUTS_NAME, record)
    return record


def read_inputs(workdir: Path) -> Inputs:
    """Read the record of the run in a folder.

    Raises:
        UserError: There is no record, or it is damaged.
    """
    path = workdir / INPUTS_NAME
    if not path.exists():
        raise UserError(
            f"{path} is missing, so nobody knows which data the run in {workdir} has read: train in another --workdir"
        )
    return read_json(path)


def check_inputs(workdir: Path, record: Inputs, inputs: Inputs) -> None:
    """Check that inputs are the same as in the record of a run. A changed plugin only causes a warning.

    Args:
        workdir: The folder of the run.
        record: The record of the run.
        inputs: The inputs to compare.

    Raises:
        UserError: An input differs. The message names it, with its path and its content then and now.
    """
    changes = []
    for name, found in inputs.items():
        if name == WEIGHTS:
            continue
        if name.startswith(PLUGIN):
            for change in _changes(name, record.get(name), found):
                warnings.warn(f"{workdir} was run with another version of the {change}", stacklevel=2)
        else:
            changes += _changes(name, record.get(name), found)
    _refuse(workdir, changes)


def check_recorded_files(workdir: Path) -> None:
    """Check that the files which a complete run has read still have the recorded content, without loading them.

    Files that no longer exist are not an error, because they cannot be mistaken for the recorded ones.

    Raises:
        UserError: A file has other content now, or there is no record.
    """
    changes = []
    for name, entry in read_inputs(workdir).items():
        if name.startswith(PLUGIN) or not isinstance(entry, dict) or entry.keys() != {"path", "content"}:
            continue
        content = entry["content"]
        path = Path(entry["path"])
        files = [path / part for part in content] if isinstance(content, dict) else [path]
        if all(file.is_file() for file in files):
            changes += _changes(name, entry, describe_files(files))
    _refuse(workdir, changes)


def started_in(workdir: Path) -> Iterator[Path]:
    """Yield the working directory of the first start of a run, or of each of its seeds. Yield nothing for a new run."""
    for path in sorted([*workdir.glob(INPUTS_NAME), *workdir.glob(f"seed-*/{INPUTS_NAME}")]):
        yield Path(str(read_json(path).get("started in", "")))


def _changes(name: str, old: Any, new: Any) -> list[str]:
    if not isinstance(new, Mapping) or "content" not in new:
        return list(differences(old, new, name))
    old = old if isinstance(old, Mapping) else {}
    places = f"({old.get('path')}, here {new['path']})" if old.get("path") != new["path"] else f"({new['path']})"
    return [f"{change} {places}" for change in differences(old.get("content"), new["content"], name)]


def _refuse(workdir: Path, changes: Sequence[str]) -> None:
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise UserError(f"the run in {workdir} has read something else: there {'; '.join(changes[:5])}{more}. {_HOW}")
