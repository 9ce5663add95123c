"""Read and write the results of a grid: a csv file with a row for each finished run, and a json file of settings.

Rows are comparable only if the runs differ in nothing but task, method, learning rate and seed. So the json file holds
all other settings, and rows are not added to a csv file whose rows were made with other settings.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from surm_jax.atomic import replacing
from surm_jax.errors import UserError

KINDS: dict[str, type] = {
    "task": str,
    "method": str,
    "part": str,
    "learning_rate": float,
    "seed": int,
    "metric": str,
    "score": float,
    "loss": float,
    "trainable": int,
    "steps": int,
    "seconds": float,
}

Row = dict[str, Any]


class Run(NamedTuple):
    """One run of a grid (see `experiments/grid.py`).

    Attributes:
        task: The name of the task.
        method: The name of the method.
        part: "search" if the run is part of the search for a learning rate, "final" otherwise.
        learning_rate: The learning rate.
        seed: The seed.
    """

    task: str
    method: str
    part: str
    learning_rate: float
    seed: int


def run_of(row: Row) -> Run:
    """Return the run that a row of results belongs to."""
    return Run(*(row[name] for name in Run._fields))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a csv file, with values of the types in `KINDS`, or an empty list if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: kind(row[name]) for name, kind in KINDS.items()} for row in csv.DictReader(file)]


def add_row(path: Path, row: Row) -> None:
    """Append a row to a csv file.

    The row is written by a single call, because another process may append to the same file.
    """
    with path.open("a", newline="") as file:
        text = io.StringIO()
        writer = csv.DictWriter(text, KINDS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue())


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that the rows in a csv file were made with, from the json file beside it.

    Args:
        path: The csv file.

    Raises:
        UserError: There is no such json file.
    """
    settings = path.with_suffix(".json")
    if not settings.is_file():
        what = f"the settings of the rows in {path} are unknown" if read_rows(path) else "there is nothing to report"
        raise UserError(f"{what}: {settings} does not exist")
    return json.loads(settings.read_text())


def note_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Store the settings of a grid in the json file beside its csv file, before the first run.

    If the csv file has rows already, nothing is written, but the settings must be those of the rows.

    Args:
        path: The csv file.
        settings: The settings by name.

    Raises:
        UserError: The rows were made with other settings, which the message names, or there is no json file with their
            settings.
    """
    new = json.loads(json.dumps(settings))
    if read_rows(path):
        old = read_settings(path)
        if changed := [name for name in new if new[name] != old.get(name)]:
            changes = "; ".join(f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in changed)
            raise UserError(
                f"{path.with_suffix('.json')} is of another grid: {changes}. Move its files away, or choose another"
                " --name"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(new, indent=1) + "\n")
