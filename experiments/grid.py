"""Run a grid of tasks times methods, with a searched learning rate and several seeds for each pair.

A cell is a pair of a task and a method. Its search compares learning rates by the score on held-out training examples,
in runs of one seed that are otherwise like the final ones. While the best rate is the smallest or the largest tried,
the next one beyond it is tried too, up to `MOST_RATES`. The final runs of the cell use the best rate and other seeds,
and their scores on the test set after the last step are the result.

Every finished run is a row of a csv file (`experiments/rows.py`) and is never repeated: the same command continues
after an interruption. Several processes may share a file if they work on different tasks or methods.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from experiments.rows import Row, Run, add_row, read_rows, run_of
from surm_jax.devices.compilation import use_compilation_cache
from surm_jax.record.metrics import NotFiniteError, read_metrics
from surm_jax.record.progress import Interruption
from surm_jax.training.config import RunConfig
from surm_jax.training.loop import train
from surm_jax.training.run import InterruptedRunError

RESULTS = Path(__file__).parent / "results"
SEARCH_SEED = 10
# How many learning rates a search may try.
MOST_RATES = 5


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs that belong to a study.

    Attributes:
        tasks: Names of the tasks, the columns of the table.
        rates: For each method, the learning rates that its searches begin with. Other rates count too if they have a
            row.
        seeds: Seeds of the final runs.
        searched: The task whose search serves all tasks; empty if each task has its own search.
    """

    tasks: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    searched: str = ""

    @classmethod
    def of_rows(cls, rows: Sequence[Row], searched: str = "", order: Iterable[str] = ()) -> Self:
        """Return the grid that rows belong to, with the methods in the given order and all others after them."""
        final = [row for row in rows if row["part"] == "final"]
        methods = {row["method"]: () for row in rows}
        return cls(
            tasks=tuple(dict.fromkeys(row["task"] for row in final)),
            rates={method: () for method in (*order, *methods) if method in methods},
            seeds=tuple(dict.fromkeys(row["seed"] for row in final)),
            searched=searched,
        )

    def searches(self, rows: Sequence[Row], task: str, method: str) -> dict[float, Row]:
        """Return the rows of a cell's search by their learning rate."""
        cell = (self.searched or task, method, "search")
        return {row["learning_rate"]: row for row in rows if (row["task"], row["method"], row["part"]) == cell}

    def rates_to_try(self, rows: Sequence[Row], task: str, method: str) -> tuple[float, ...]:
        """Return the learning rates of a cell's search, tried or not, the smallest first."""
        tried = self.searches(rows, task, method)
        rates = {*self.rates[method], *tried}
        if rates == tried.keys() and 3 <= len(rates) < MOST_RATES:
            scores, best = {row["score"] for row in tried.values()}, _best(tried.values())
            # Equal scores usually mean that every run gave one constant answer, because the rates are too large.
            if best == min(rates) or len(scores) == 1:
                rates.add(next_rate(min(rates), -1))
            elif best == max(rates):
                rates.add(next_rate(best, 1))
        return tuple(sorted(rates))

    def best_rate(self, rows: Sequence[Row], task: str, method: str) -> float | None:
        """Return the learning rate with the best held-out score, or None while a rate remains to be tried.

        If scores are equal, the smaller loss decides: a short run may give one constant answer at every rate.
        """
        tried = self.searches(rows, task, method)
        return _best(tried.values()) if tried and len(self.rates_to_try(rows, task, method)) == len(tried) else None

    def wanted(self, rows: Sequence[Row]) -> list[Run]:
        """Return all runs that the grid is known to need, task by task, and method by method within a task."""
        runs = []
        for task in self.tasks:
            for method in self.rates:
                rates = self.rates_to_try(rows, task, method)
                runs += [Run(self.searched or task, method, "search", rate, SEARCH_SEED) for rate in rates]
                if (best := self.best_rate(rows, task, method)) is not None:
                    runs += [Run(task, method, "final", best, seed) for seed in self.seeds]
        return list(dict.fromkeys(runs))

    def missing(self, rows: Sequence[Row]) -> list[Run]:
        """Return the wanted runs that have no row. Once a search is finished, they include its final runs."""
        made = {run_of(row) for row in rows}
        return [run for run in self.wanted(rows) if run not in made]

    def size(self, rows: Sequence[Row]) -> int:
        """Return the number of runs that is known so far; a search may still need more."""
        searches = sum(run.part == "search" for run in self.wanted(rows))
        return searches + len(self.tasks) * len(self.rates) * len(self.seeds)

    def scores(self, rows: Sequence[Row], task: str, method: str) -> list[float]:
        """Return the scores of a cell's final runs in percent. NaN is the score of a run that diverged."""
        cell = (task, method, "final", self.best_rate(rows, task, method))
        names = ("task", "method", "part", "learning_rate")
        return [100 * row["score"] for row in rows if tuple(row[name] for name in names) == cell]

    def trained(self, rows: Sequence[Row], method: str) -> int | None:
        """Return how many parameters a method trains, with the largest head, or None if it has no row."""
        return max((row["trainable"] for row in rows if row["method"] == method), default=None)

    def metrics(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return the name of the metric of each task that has rows."""
        named = {row["task"]: row["metric"] for row in rows if row["metric"]}
        return {task: named[task] for task in self.tasks if task in named}


def _best(rows: Collection[Row]) -> float:
    return max(rows, key=lambda row: (row["score"], -row["loss"]))["learning_rate"]


def next_rate(rate: float, direction: int) -> float:
    """Return the next learning rate above (1) or below (-1) on the scale 1, 3, 10, 30, ...

    >>> next_rate(0.01, 1), next_rate(0.03, 1), next_rate(0.01, -1), next_rate(0.02, 1)
    (0.03, 0.1, 0.003, 0.1)
    """
    place = round(2 * math.log10(rate) + direction)
    return float(f"{(3 if place % 2 else 1)}e{place // 2}")


def measure(run: Run, config: RunConfig, root: Path, interruption: Interruption) -> Row:
    """Make a run, or continue it, and return its row.

    A run that diverges has a row too. In a search its score is minus infinity, in a final run NaN.

    Args:
        run: The run to make. A search is scored on its held-out examples, a final run on the test set.
        config: Its configuration.
        root: The folder that holds the folders of runs.
        interruption: Asks the run to save and stop.

    Raises:
        UserError: As in `surm_jax.training.loop.train`.
        InterruptedRunError: The run was stopped.
    """
    folder = root / re.sub(r"[/\\:]", "_", run.task) / f"{run.method}-{run.part}-{run.learning_rate:g}-{run.seed}"
    try:
        result = train(config, run.seed, folder, interruption)
    except NotFiniteError as error:
        print(f"{error}: this run counts as diverged", flush=True)
        score = -math.inf if run.part == "search" else math.nan
        measured = {"metric": "", "score": score, "loss": math.inf, "trainable": 0, "steps": 0, "seconds": 0.0}
        return {**run._asdict(), **measured}
    if run.part == "search":
        last = list(read_metrics(folder))[-1]
        score, loss = _first(last, "holdout_", ""), last["holdout_loss"]
    else:
        # A set with several splits for testing, such as MNLI, is scored on the first.
        score, loss = result["metrics"][result["metric"]], _first(result["metrics"], "", "_loss")
    return {
        **run._asdict(),
        "metric": result["metric"].removeprefix("test_"),
        "score": round(score, 6),
        "loss": round(loss, 6),
        "trainable": result["parameters"]["trainable"],
        "steps": result["steps"],
        "seconds": result["seconds"],
    }


def _first(values: Mapping[str, float], prefix: str, suffix: str) -> float:
    return next(value for name, value in values.items() if name.startswith(prefix) and name.endswith(suffix))


def work(grid: Grid, path: Path, config_of: Callable[[Run], RunConfig], root: Path) -> None:
    """Make the runs of a grid that have no row yet.

    Args:
        grid: The grid, or the part of it that this process works on.
        path: The csv file of rows.
        config_of: Returns the configuration of a run.
        root: The folder that holds the folders of runs.

    Raises:
        InterruptedRunError: A signal arrived, during a run or between two.
    """
    use_compilation_cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with Interruption() as interruption:
        while (missing := grid.missing(rows := read_rows(path))) and not interruption.signal:
            run, size = missing[0], grid.size(rows)
            done = len({*grid.wanted(rows)}) - len(missing)
            print(f"\n== run {done + 1} of {size}, after {time.monotonic() - began:.0f} s: {run}", flush=True)
            add_row(path, measure(run, config_of(run), root, interruption))
    if interruption.signal:
        text = f"stopped with {len(missing)} runs to make for {path}; the same command continues"
        raise InterruptedRunError(text, 128 + interruption.signal)
