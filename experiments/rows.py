"""The rows of a grid in a csv file, one per run, and the settings that all of them have in common beside it.

Rows belong together only if everything but task, method, rate and seed is the same. So a grid does not go on with rows
of other settings.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from surm_jax.errors import UserError
from surm_jax.files import replacing

COLUMNS = (
    "task",
    "method",
    "part",
    "learning_rate",
    "seed",
    "metric",
    "score",
    "loss",
    "trainable",
    "steps",
    "seconds",
)
_KINDS = {
    "learning_rate": float,
    "seed": int,
    "score": float,
    "loss": float,
    "trainable": int,
    "steps": int,
    "seconds": float,
}

Row = dict[str, Any]


class Run(NamedTuple):
    """One run of a grid. Its part is "search" or "final"."""

    task: str
    method: str
    part: str
    learning_rate: float
    seed: int


def run_of(row: Row) -> Run:
    """Returns the run that a row is of."""
    return Run(*(row[name] for name in Run._fields))


def settings_path(path: Path) -> Path:
    """Returns where the settings of the rows in a csv file are."""
    return path.with_suffix(".json")


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of the rows in a csv file.

    Raises:
        UserError: if there are none.
    """
    if not settings_path(path).is_file():
        what = "nobody knows the settings of the rows in {path}" if read_rows(path) else "there is nothing to report"
        raise UserError(f"{what.format(path=path)}: {settings_path(path)} does not exist")
    return json.loads(settings_path(path).read_text())


def note_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings beside the csv file of rows, or checks that they are those of the rows that are there.

    Raises:
        UserError: naming what differs, or if there are rows without settings.
    """
    new = json.loads(json.dumps(settings))
    if read_rows(path):
        old = read_settings(path)
        if changed := [name for name in new if new[name] != old.get(name)]:
            changes = "; ".join(f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in changed)
            raise UserError(
                f"{settings_path(path)} is of another grid: {changes}. Move its files away, or give this one another"
                " --name"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(settings_path(path)) as temporary:
        temporary.write_text(json.dumps(new, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Returns the rows that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: _KINDS.get(name, str)(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]


def add_row(path: Path, row: Row) -> None:
    """Appends a row in one write: another process may append too."""
    with path.open("a", newline="") as file:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue())
