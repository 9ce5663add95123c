"""The checkpoints of a run, from which an interrupted run resumes.

A checkpoint holds the trained arrays, the state of the optimiser and the position in the data. It does not hold the
frozen weights of the base model. It is a folder with the step as its name. The folder contains `arrays/`, which Orbax
writes, and `checkpoint.json`, which says what the checkpoint belongs to: the position in the data, the SHA-256 of every
file, the configuration of the run, and a digest of every array of the base model (its fingerprint).

The folder is written under a temporary name, and renamed when everything is on the disk. The last two checkpoints and
the one with the best evaluation are kept. Reading a checkpoint raises an error if its arrays have another structure, if
it was saved with other weights of the base model, or if any bit of its files has changed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from surm_jax.atomic import move_folder, remove_folder, remove_temporaries
from surm_jax.devices.processes import is_first, on_first
from surm_jax.errors import UserError, first_line
from surm_jax.files import read_json
from surm_jax.peft import check_fingerprint
from surm_jax.record.workdir import config_changes

State = Any
"""A named tuple of arrays and pytrees of arrays, such as `surm_jax.training.step.TrainState`. Its field `step` is the
number of updates made."""

ARRAYS_NAME = "arrays"
RECORD_NAME = "checkpoint.json"


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        state: The arrays, sharded like the template that was passed to `Checkpoints.restore`.
        data: The position of the iterator over training batches.
        seconds: The working time of the run until this checkpoint, summed over all its starts.
        score: The task's first metric in the evaluation at this step, or None if there was no evaluation.
    """

    state: State
    data: dict[str, Any]
    seconds: float
    score: float | None


class Checkpoints:
    """The folder of a run's checkpoints. Its methods save and restore them.

    If a run has several processes, all of them write the arrays, and the first one does everything else.

    Args:
        folder: The folder. It is made if it does not exist. Half-written checkpoints of killed processes are removed.
        base: A digest of every frozen array, by its path (`surm_jax.peft.fingerprint`).
        config: The configuration of the run, as nested dictionaries.

    Raises:
        UserError: The folder cannot be read or made, or a checkpoint in it is damaged. The message names the damaged
            checkpoint and the last good one.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        base: Mapping[str, str],
        config: Mapping[str, Any],
    ):
        self.folder = Path(folder).absolute()
        self._base, self._config = dict(base), dict(config)
        try:
            on_first(self._open)
        except OSError as error:
            raise UserError(f"cannot open the checkpoints in {self.folder}: {error.strerror}") from None
        self._scores: dict[int, float | None] = {}
        damaged = {}
        for step in _steps_in(self.folder):
            try:
                self._scores[step] = _read_record(self.folder / str(step))["score"]
            except UserError as error:
                damaged[step] = error
        if damaged:
            raise UserError(self._damaged(max(damaged), damaged[max(damaged)]))

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, or None if there is no checkpoint."""
        return max(self._scores, default=None)

    def save(self, state: State, data: dict[str, Any], seconds: float, score: float | None = None) -> None:
        """Write a checkpoint. Then remove all checkpoints except the last two and the one with the best score.

        If there already is a checkpoint of the same step, it is replaced. Collective: call it from every process.

        Args:
            state: The arrays.
            data: The state of the iterator over training batches. JSON must be able to represent it.
            seconds: The working time of the run until now, summed over all its starts.
            score: The task's first metric in the evaluation at this step, or None if there was no evaluation. Larger is
                better.

        Raises:
            UserError: The checkpoint cannot be written. Earlier checkpoints are not changed.
        """
        step = int(state.step)
        record = {
            "step": step,
            "config": self._config,
            "base": self._base,
            "data": data,
            "seconds": seconds,
            "score": score,
            **_digest(state),
        }
        temporary = self.folder / f".{step}.tmp"
        try:
            ocp.save(temporary / ARRAYS_NAME, state._asdict())
            on_first(lambda: self._complete(temporary, record))
            self._scores[step] = score
            self._prune()
        except Exception as error:  # Orbax passes on any error of the file system or storage library below it.
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint {self.folder / str(step)}: {first_line(error)}. Earlier ones are as they"
                " were"
            ) from error

    def restore(self, template: State) -> Restored:
        """Read the last checkpoint, after checking that it belongs to this run and is not damaged.

        Args:
            template: A state of the same structure. Its shapes, dtypes and shardings are those that the restored arrays
                get.

        Raises:
            UserError: The checkpoint is damaged, has another structure, or belongs to another run or base model.
        """
        step = self.latest
        if step is None:
            raise ValueError(f"there is no checkpoint in {self.folder}")
        path = self.folder / str(step)
        try:
            record = _read_record(path)
        except UserError as error:
            raise UserError(self._damaged(step, error)) from None
        if changes := config_changes(record["config"], self._config):
            raise UserError(f"the checkpoint {path} is of another run; there {'; '.join(changes[:5])}")
        check_fingerprint(self._base, record["base"], f"the checkpoint {path}")
        expected = _digest(template)["leaves"]
        if record["leaves"] != expected:
            names = sorted(expected.keys() | record["leaves"].keys())
            different = [name for name in names if expected.get(name) != record["leaves"].get(name)]
            raise UserError(f"the checkpoint {path} does not fit this run: they differ in {', '.join(different[:6])}")
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), template
        )
        try:
            state = template._replace(**ocp.load(path / ARRAYS_NAME, abstract._asdict()))
        except Exception as error:
            raise UserError(self._damaged(step, first_line(error))) from error
        if _digest(state)["arrays"] != record["arrays"]:
            raise UserError(self._damaged(step, "its arrays are not those that were saved"))
        return Restored(state, record["data"], record["seconds"], record["score"])

    def _complete(self, temporary: Path, record: dict[str, Any]) -> None:
        """Write `checkpoint.json` next to the arrays, and rename the folder to its final name."""
        record["files"] = _files(temporary)
        record["sha256"] = _sum(record)
        (temporary / RECORD_NAME).write_text(json.dumps(record, indent=1))
        move_folder(temporary, self.folder / str(record["step"]))

    def _prune(self) -> None:
        kept = set(sorted(self._scores)[-2:])
        if scored := {step: score for step, score in self._scores.items() if score is not None}:
            kept.add(max(scored, key=lambda step: (scored[step], step)))
        for step in self._scores.keys() - kept:
            if is_first():
                remove_folder(self.folder / str(step))
            del self._scores[step]

    def _damaged(self, step: int, why: object) -> str:
        others = [other for other in self._scores if other != step]
        advice = f"go on from step {max(others)}" if others else "start from the beginning"
        return f"the checkpoint {self.folder / str(step)} is damaged ({why}); delete that folder to {advice}"


def last_checkpoint(folder: Path) -> str:
    """Return a sentence that names the last checkpoint in a folder, for error messages.

    >>> last_checkpoint(Path("nowhere"))
    'There is no checkpoint yet'
    """
    if not (steps := _steps_in(folder)):
        return "There is no checkpoint yet"
    return f"The last good checkpoint is that of step {max(steps)}, {folder / str(max(steps))}"


def _steps_in(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


_RECORD: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "config": dict,
    "base": dict,
    "data": dict,
    "seconds": (int, float),
    "score": (int, float, type(None)),
    "leaves": dict,
    "arrays": str,
    "files": dict,
    "sha256": str,
}


def _read_record(checkpoint: Path) -> dict[str, Any]:
    """Read `checkpoint.json` of a checkpoint, and compare every file with the SHA-256 that is stored there.

    Raises:
        UserError: A file is missing or damaged, or does not belong to the checkpoint. The message names the file.
    """
    record = read_json(checkpoint / RECORD_NAME)
    if wrong := [key for key, kind in _RECORD.items() if not isinstance(record.get(key, ...), kind)]:
        raise UserError(f"{RECORD_NAME} has no proper {wrong[0]!r}")
    if record["sha256"] != _sum(record):
        raise UserError(f"{RECORD_NAME} was changed")
    if record["step"] != int(checkpoint.name):
        raise UserError(f"{RECORD_NAME} is of step {record['step']}")
    try:
        there = _files(checkpoint)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    del there[RECORD_NAME]
    for name in sorted(there.keys() | record["files"].keys()):
        if there.get(name) != record["files"].get(name):
            if name not in record["files"]:
                raise UserError(f"{name} does not belong to it")
            raise UserError(f"{name} {'was changed' if name in there else 'is missing'}")
    return record


def _sum(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a `checkpoint.json` that is stored in its own field `sha256`. That field is left out."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder and its subfolders. The keys are the relative paths."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _digest(state: State) -> dict[str, Any]:
    """Describe the arrays of a checkpoint by two fields of its `checkpoint.json`.

    `leaves` maps the path of every array to its dtype and shape. `arrays` is one SHA-256 of the paths and bits of all
    arrays.
    """
    leaves, sha256 = {}, hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = f"{leaf.dtype}{list(leaf.shape)}"
        sha256.update(name.encode())
        sha256.update(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data)
    return {"leaves": leaves, "arrays": sha256.hexdigest()}
