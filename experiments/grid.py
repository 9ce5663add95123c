"""Compare methods on tasks: for every pair, search the best learning rate, then train with several seeds.

A pair of a task and a method is a cell of the grid. A cell needs two kinds of runs:

- The search compares learning rates. For each rate there is one run, all with the same seed, which is scored on
  training examples that were held out. Otherwise these runs are like the final ones. As long as the best rate is the
  smallest or the largest one tried, the search also tries the next rate beyond it, up to `MOST_RATES` rates in all.
- The final runs use the best learning rate and other seeds. Their scores on the test set after the last step are the
  result of the cell.

Every finished run is a row of a csv file (`experiments/rows.py`). A run that has a row is never repeated, so the same
command continues a grid after an interruption. Several processes may share a csv file if they work on different tasks
or methods.
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
# The largest number of learning rates that a search tries.
MOST_RATES = 5


@dataclasses.dataclass(frozen=True)
class Grid:
    """The tasks, methods, learning rates and seeds of an experiment, which determine the runs that it needs.

    Most methods of this class take `rows`, all rows of finished runs so far, because the runs that are still needed
    depend on the results of earlier ones.

    Attributes:
        tasks: The names of the tasks, which are the columns of the table of scores.
        rates: For each method, the learning rates that its searches begin with. A search also takes into account rows
            of finished runs with other learning rates.
        seeds: The seeds of the final runs.
        searched: The task on which learning rates are searched for all tasks. If it is empty, each task has its own
            search.
    """

    tasks: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    searched: str = ""

    @classmethod
    def of_rows(cls, rows: Sequence[Row], searched: str = "", order: Iterable[str] = ()) -> Self:
        """Return the grid to which some rows belong: all their methods, and the tasks and seeds of their final runs.

        Args:
            rows: The rows of finished runs.
            searched: The task on which learning rates are searched for all tasks, as in the class.
            order: The order of methods. Methods that it does not name come last.
        """
        final = [row for row in rows if row["part"] == "final"]
        methods = {row["method"]: () for row in rows}
        return cls(
            tasks=tuple(dict.fromkeys(row["task"] for row in final)),
            rates={method: () for method in (*order, *methods) if method in methods},
            seeds=tuple(dict.fromkeys(row["seed"] for row in final)),
            searched=searched,
        )

    def searches(self, rows: Sequence[Row], task: str, method: str) -> dict[float, Row]:
        """Return the rows of the search for a task and a method, by learning rate."""
        cell = (self.searched or task, method, "search")
        return {row["learning_rate"]: row for row in rows if (row["task"], row["method"], row["part"]) == cell}

    def rates_to_try(self, rows: Sequence[Row], task: str, method: str) -> tuple[float, ...]:
        """Return all learning rates that the search for a task and a method needs so far, in ascending order.

        If all of them have a row and the best is at an end of the list, the next rate beyond that end is added. This
        happens only if there are at least three and fewer than `MOST_RATES` rates.
        """
        tried = self.searches(rows, task, method)
        rates = {*self.rates[method], *tried}
        if rates == tried.keys() and 3 <= len(rates) < MOST_RATES:
            scores, best = {row["score"] for row in tried.values()}, _best(tried.values())
            # If all scores are equal, most likely all rates are too large and every model predicts a constant. So try
            # a smaller rate.
            if best == min(rates) or len(scores) == 1:
                rates.add(next_rate(min(rates), -1))
            elif best == max(rates):
                rates.add(next_rate(best, 1))
        return tuple(sorted(rates))

    def best_rate(self, rows: Sequence[Row], task: str, method: str) -> float | None:
        """Return the learning rate with the best held-out score, or None if the search is not finished.

        If scores are equal, the rate with the smaller loss is better. Scores are often equal after short runs, in which
        the model still predicts a constant at every rate.
        """
        tried = self.searches(rows, task, method)
        return _best(tried.values()) if tried and len(self.rates_to_try(rows, task, method)) == len(tried) else None

    def wanted(self, rows: Sequence[Row]) -> list[Run]:
        """Return all runs that the grid needs as far as is known, finished or not, ordered by task and then by method.

        The final runs of a cell are known only after its search is finished.
        """
        runs = []
        for task in self.tasks:
            for method in self.rates:
                rates = self.rates_to_try(rows, task, method)
                runs += [Run(self.searched or task, method, "search", rate, SEARCH_SEED) for rate in rates]
                if (best := self.best_rate(rows, task, method)) is not None:
                    runs += [Run(task, method, "final", best, seed) for seed in self.seeds]
        return list(dict.fromkeys(runs))

    def missing(self, rows: Sequence[Row]) -> list[Run]:
        """Return the runs of `wanted` that have no row yet, in the same order."""
        made = {run_of(row) for row in rows}
        return [run for run in self.wanted(rows) if run not in made]

    def size(self, rows: Sequence[Row]) -> int:
        """Return the number of runs in the whole grid, as far as is known.

        All final runs are counted, and the searches with the learning rates that they need so far.
        """
        searches = sum(run.part == "search" for run in self.wanted(rows))
        return searches + len(self.tasks) * len(self.rates) * len(self.seeds)

    def scores(self, rows: Sequence[Row], task: str, method: str) -> list[float]:
        """Return the test scores, in percent, of the final runs for a task and a method at the best learning rate.

        The score of a run that diverged is NaN.
        """
        cell = (task, method, "final", self.best_rate(rows, task, method))
        names = ("task", "method", "part", "learning_rate")
        return [100 * row["score"] for row in rows if tuple(row[name] for name in names) == cell]

    def trained(self, rows: Sequence[Row], method: str) -> int | None:
        """Return how many parameters a method trains, including the head, or None if no row is of this method.

        The number may differ between tasks, whose heads may have different sizes. The largest number is returned.
        """
        return max((row["trainable"] for row in rows if row["method"] == method), default=None)

    def metrics(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return the name of the metric in which the scores of a task are measured, for each task with rows."""
        named = {row["task"]: row["metric"] for row in rows if row["metric"]}
        return {task: named[task] for task in self.tasks if task in named}


def _best(rows: Collection[Row]) -> float:
    return max(rows, key=lambda row: (row["score"], -row["loss"]))["learning_rate"]


def next_rate(rate: float, direction: int) -> float:
    """Return the next learning rate on the scale ..., 0.1, 0.3, 1, 3, 10, ...

    Args:
        rate: The learning rate to start from. It is rounded to the scale first.
        direction: 1 for the next larger rate, -1 for the next smaller one.

    In the last example, 0.02 is first rounded to 0.03.

    >>> next_rate(0.01, 1), next_rate(0.03, 1), next_rate(0.01, -1), next_rate(0.02, 1)
    (0.03, 0.1, 0.003, 0.1)
    """
    place = round(2 * math.log10(rate) + direction)
    return float(f"{(3 if place % 2 else 1)}e{place // 2}")


def measure(run: Run, config: RunConfig, root: Path, interruption: Interruption) -> Row:
    """Train and evaluate one run of a grid, or continue it if it was interrupted earlier, and return its row.

    A run that diverges gets a row too. Its score is minus infinity if it belongs to a search, and NaN otherwise.

    Args:
        run: The run. If it belongs to a search, it is scored on held-out training examples, otherwise on the test set.
        config: The training configuration of the run.
        root: The folder in which every run has its own folder.
        interruption: Tells whether a signal has asked the run to save its state and stop.

    Raises:
        UserError: As in `surm_jax.training.loop.train`.
        InterruptedRunError: A signal stopped the run.
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
        # A data set with several test splits, such as MNLI, is scored on the first of them.
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
    """Do all runs of a grid that are not finished yet, and append a row to a csv file as soon as one ends.

    Args:
        grid: The grid, or the part of it that this process works on.
        path: The csv file of rows.
        config_of: Returns the training configuration of a run.
        root: The folder in which every run has its own folder.

    Raises:
        InterruptedRunError: A signal asked the process to stop, during a run or between two runs.
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
