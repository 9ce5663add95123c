"""A grid of runs that goes on where it was stopped: tasks times methods, a learning rate each, some seeds.

The learning rate of a cell, a task and a method, is the best of some on training examples that are held out (one seed,
as many steps); what counts are runs of other seeds with it, on the test set after their last step. Every finished run
is a row of a csv file and is not made again. Two processes may work on one file, each on tasks or methods of its own.
"""

import csv
import dataclasses
import io
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surm_jax.errors import UserError
from surm_jax.training.compilation import use_compilation_cache
from surm_jax.training.config import RunConfig
from surm_jax.training.loop import InterruptedRunError, train
from surm_jax.training.metrics import NotFiniteError, read_metrics
from surm_jax.training.progress import Interruption

RESULTS = Path(__file__).parent / "results"
SEARCH_SEED = 10
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


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which runs there are, and what their rows say.

    Attributes:
      tasks: names of the tasks, the columns of its table.
      rates: by method, the learning rates that it may choose from, the smallest first.
      seeds: of the runs that count.
      searched: the task on whose held-out examples the rates for all tasks are chosen; empty: each on its own.
    """

    tasks: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    searched: str = ""

    def best_rate(self, rows: Sequence[Row], task: str, method: str) -> float | None:
        """Returns the learning rate with the best score on held-out examples, or None if one is still to be tried.

        Of equal scores, the smaller loss decides: a short run may predict a single class whatever the rate.
        """
        tried = [
            row
            for row in rows
            if (row["task"], row["method"], row["part"]) == (self.searched or task, method, "search")
            and row["learning_rate"] in self.rates[method]
        ]
        if len(tried) < max(1, len(self.rates[method])):
            return None
        return max(tried, key=lambda row: (row["score"], -row["loss"]))["learning_rate"]

    def next_run(self, rows: Sequence[Row]) -> Run | None:
        """Returns the first run that has no row: task by task, all methods of a task in turn."""
        there = {tuple(row[name] for name in Run._fields) for row in rows}
        for task in self.tasks:
            for method, rates in self.rates.items():
                runs = [Run(self.searched or task, method, "search", rate, SEARCH_SEED) for rate in rates]
                if (best := self.best_rate(rows, task, method)) is not None:
                    runs += [Run(task, method, "final", best, seed) for seed in self.seeds]
                for run in runs:
                    if tuple(run) not in there:
                        return run
        return None

    def size(self) -> int:
        """Returns the number of runs."""
        searches = (1 if self.searched else len(self.tasks)) * sum(map(len, self.rates.values()))
        return searches + len(self.tasks) * len(self.rates) * len(self.seeds)

    def done(self, rows: Sequence[Row]) -> int:
        """Returns how many of the rows are of this grid."""
        tasks = {"search": (self.searched,) if self.searched else self.tasks, "final": self.tasks}
        return sum(row["method"] in self.rates and row["task"] in tasks[row["part"]] for row in rows)

    def scores(self, rows: Sequence[Row], task: str, method: str) -> list[float]:
        """Returns the scores of a cell in percent: of the final runs with the rate that was chosen."""
        cell = (task, method, "final", self.best_rate(rows, task, method))
        names = ("task", "method", "part", "learning_rate")
        return [100 * row["score"] for row in rows if tuple(row[name] for name in names) == cell]

    def trained(self, rows: Sequence[Row], method: str) -> int | None:
        """Returns how many numbers a method trains, with the largest head; None if it has no row."""
        return max((row["trainable"] for row in rows if row["method"] == method), default=None)

    def metrics(self, rows: Sequence[Row]) -> dict[str, str]:
        """Returns the name of what is measured by task, for the tasks that have rows."""
        named = {row["task"]: row["metric"] for row in rows if row["metric"]}
        return {task: named[task] for task in self.tasks if task in named}

    def table(self, rows: Sequence[Row], mean: bool = True) -> str:
        """Returns the table of all cells in markdown; cells without all their seeds are empty.

        Args:
          rows: of all runs so far.
          mean: whether the last column is the mean over tasks.
        """
        metrics = self.metrics(rows)
        head = [f"{task} ({metric})" for task, metric in metrics.items()] + ["mean"] * mean
        lines = ["| method | trained | " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) + 1)]
        for method in self.rates:
            cells = [self.scores(rows, task, method) for task in metrics]
            complete = [cell for cell in cells if len(cell) == len(self.seeds)]
            texts = [mean_and_deviation(cell) if len(cell) == len(self.seeds) else "" for cell in cells]
            if mean:
                over = statistics.mean(map(statistics.mean, complete)) if len(complete) == len(self.tasks) else None
                texts.append("" if over is None else f"{over:.1f}")
            trained = self.trained(rows, method)
            lines.append(f"| {method} | {'' if trained is None else f'{trained:,}'} | " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n"

    def rates_table(self, rows: Sequence[Row]) -> str:
        """Returns the learning rates that were chosen; a star marks those at an end of what was tried."""
        tasks = (self.searched,) if self.searched else self.tasks
        lines = ["| method | tried | " + " | ".join(tasks) + " |", "|---|---|" + "---:|" * len(tasks)]
        for method, rates in self.rates.items():
            chosen = [self.best_rate(rows, task, method) for task in tasks]
            ends = (rates[0], rates[-1])
            texts = ["" if best is None else f"{best:g}{' *' if best in ends else ''}" for best in chosen]
            lines.append(f"| {method} | {', '.join(f'{rate:g}' for rate in rates)} | " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Returns the mean and the standard deviation of a sample, which one value alone does not have.

    >>> mean_and_deviation([80.0, 81.0, 82.0]), mean_and_deviation([80.0])
    ('81.0 ± 1.0', '80.0')
    """
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def measure(run: Run, config: RunConfig, root: Path, interruption: Interruption) -> Row:
    """Makes a run, or goes on with it, and returns its row. A search that diverges has the worst of all scores.

    Args:
      run: which one; the score of a search is that of the held-out examples.
      config: its configuration.
      root: where its folder is or will be.
      interruption: asks it to save and stop.

    Raises:
      UserError: for bad input, see `surm_jax.training.loop.train`.
      InterruptedRunError: when it was stopped.
    """
    folder = root / re.sub(r"[/\\:]", "_", run.task) / f"{run.method}-{run.part}-{run.learning_rate:g}-{run.seed}"
    try:
        result = train(config, run.seed, folder, interruption)
    except NotFiniteError as error:
        if run.part != "search":
            raise
        print(f"{error}: this learning rate counts as the worst", flush=True)
        worst = {"metric": "", "score": -math.inf, "loss": math.inf, "trainable": 0, "steps": 0, "seconds": 0.0}
        return {**run._asdict(), **worst}
    metric = result["metric"].removeprefix("test_")
    if run.part == "search":
        measured = list(read_metrics(folder))[-1]
        score, loss = measured[f"holdout_{metric}"], measured["holdout_loss"]
    else:
        score, loss = result["metrics"][f"test_{metric}"], result["metrics"]["test_loss"]
    return {
        **run._asdict(),
        "metric": metric,
        "score": round(score, 6),
        "loss": round(loss, 6),
        "trainable": result["parameters"]["trainable"],
        "steps": result["steps"],
        "seconds": result["seconds"],
    }


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


def work(
    grid: Grid,
    path: Path,
    make: Callable[[Run, Interruption], Row],
    report: Callable[[list[Row]], None],
    *,
    only_report: bool = False,
) -> None:
    """Makes the runs of a grid that have no row yet, and reports after each.

    Args:
      grid: the runs to make.
      path: the csv file of rows.
      make: makes a run and returns its row.
      report: writes what is made of the rows.
      only_report: makes no run.
    """
    use_compilation_cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    began = time.monotonic()
    with Interruption() as interruption:
        while not (only_report or interruption.signal) and (run := grid.next_run(rows)):
            after = f"after {time.monotonic() - began:.0f} s"
            print(f"\n== run {grid.done(rows) + 1} of {grid.size()}, {after}: {run}", flush=True)
            add_row(path, make(run, interruption))
            rows = read_rows(path)
            report(rows)
    report(rows)


def command(main: Callable[[], None]) -> None:
    """Runs a script: what is wrong becomes one line, an interruption its exit status."""
    try:
        main()
    except InterruptedRunError as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.status)
    except UserError as error:
        sys.exit(f"error: {error}")
