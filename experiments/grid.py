"""A grid of runs that goes on where it was stopped: tasks times methods, a learning rate each, some seeds.

The learning rate of a cell, a task and a method, is the best of some on training examples that are held out (one seed,
as many steps). If the best one is at an end of those, the next beyond is tried as well, up to `MOST_RATES`; the same
for every method. What counts are runs of other seeds with it, on the test set after their last step. Every finished run
is a row of a csv file and is not made again. Two processes may work on one file, each on tasks or methods of its own.
"""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from experiments.rows import Row, Run, add_row, read_rows, run_of
from surm_jax.devices.compilation import use_compilation_cache
from surm_jax.record.metrics import NotFiniteError, read_metrics
from surm_jax.record.progress import Interruption
from surm_jax.training.config import RunConfig
from surm_jax.training.loop import InterruptedRunError, train

RESULTS = Path(__file__).parent / "results"
SEARCH_SEED = 10
# How many learning rates a cell may try.
MOST_RATES = 5


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which runs there are, and what their rows say.

    Attributes:
        tasks: names of the tasks, the columns of its table.
        rates: by method, the learning rates that it chooses from at least. Others that were tried count too.
        seeds: of the runs that count.
        searched: the task on whose held-out examples the rates for all tasks are chosen; empty: each on its own.
    """

    tasks: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    searched: str = ""

    def to_try(self, rows: Sequence[Row], task: str, method: str) -> tuple[float, ...]:
        """Returns the learning rates that were or are to be tried for a cell, the smallest first."""
        tried = self._searches(rows, task, method)
        rates = {*self.rates[method], *tried}
        if rates == tried.keys() and 3 <= len(rates) < MOST_RATES:
            scores, best = {row["score"] for row in tried.values()}, _best(tried.values())
            # Where all of them give the same, a constant answer mostly, they are mostly too large.
            if best == min(rates) or len(scores) == 1:
                rates.add(next_rate(min(rates), -1))
            elif best == max(rates):
                rates.add(next_rate(best, 1))
        return tuple(sorted(rates))

    def best_rate(self, rows: Sequence[Row], task: str, method: str) -> float | None:
        """Returns the learning rate with the best score on held-out examples, or None if one is still to be tried.

        Of equal scores, the smaller loss decides: a short run may predict a single class whatever the rate.
        """
        tried = self._searches(rows, task, method)
        return _best(tried.values()) if tried and len(self.to_try(rows, task, method)) == len(tried) else None

    def _searches(self, rows: Sequence[Row], task: str, method: str) -> dict[float, Row]:
        cell = (self.searched or task, method, "search")
        return {row["learning_rate"]: row for row in rows if (row["task"], row["method"], row["part"]) == cell}

    def wanted(self, rows: Sequence[Row]) -> list[Run]:
        """Returns all runs that are known to belong to the grid: task by task, all methods of a task in turn."""
        runs = []
        for task in self.tasks:
            for method in self.rates:
                rates = self.to_try(rows, task, method)
                runs += [Run(self.searched or task, method, "search", rate, SEARCH_SEED) for rate in rates]
                if (best := self.best_rate(rows, task, method)) is not None:
                    runs += [Run(task, method, "final", best, seed) for seed in self.seeds]
        return list(dict.fromkeys(runs))

    def next_run(self, rows: Sequence[Row]) -> Run | None:
        """Returns the first run that has no row."""
        there = {run_of(row) for row in rows}
        return next((run for run in self.wanted(rows) if run not in there), None)

    def size(self, rows: Sequence[Row]) -> int:
        """Returns the number of runs, as far as it is known: searches may ask for more."""
        searches = sum(run.part == "search" for run in self.wanted(rows))
        return searches + len(self.tasks) * len(self.rates) * len(self.seeds)

    def done(self, rows: Sequence[Row]) -> int:
        """Returns how many of the grid's runs have a row."""
        return len({run_of(row) for row in rows} & {*self.wanted(rows)})

    def scores(self, rows: Sequence[Row], task: str, method: str) -> list[float]:
        """Returns the scores of a cell in percent: of the final runs with the rate that was chosen. NaN: diverged."""
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
        """Returns the table of all cells in markdown; of cells without all their seeds it says how many they have.

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
            texts = ["" if not cell else mean_and_deviation(cell) + self._lacking(cell) for cell in cells]
            if mean:
                over = [statistics.mean(cell) for cell in complete if not any(map(math.isnan, cell))]
                texts.append(f"{statistics.mean(over):.1f}" if over and len(over) == len(self.tasks) else "")
            trained = self.trained(rows, method)
            lines.append(f"| {method} | {'' if trained is None else f'{trained:,}'} | " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n"

    def _lacking(self, cell: Sequence[float]) -> str:
        return f" ({len(cell)} of {len(self.seeds)} seeds)" if len(cell) < len(self.seeds) else ""

    def rates_table(self, rows: Sequence[Row]) -> str:
        """Returns the learning rates that were chosen.

        A star marks one at an end of what was tried, a dash a cell where all rates gave the same score.
        """
        tasks = (self.searched,) if self.searched else self.tasks
        lines = ["| method | tried | " + " | ".join(tasks) + " |", "|---|---|" + "---:|" * len(tasks)]
        for method in self.rates:
            rates, texts = {*self.rates[method]}, []
            for task in tasks:
                tried, best = self._searches(rows, task, method), self.best_rate(rows, task, method)
                rates |= {*self.to_try(rows, task, method)}
                mark = " *" if best in (min(tried, default=None), max(tried, default=None)) else ""
                mark = " -" if len(tried) > 1 and len({row["score"] for row in tried.values()}) == 1 else mark
                texts.append("" if best is None else f"{best:g}{mark}")
            lines.append(f"| {method} | {', '.join(f'{rate:g}' for rate in sorted(rates))} | {' | '.join(texts)} |")
        return "\n".join(lines) + "\n"


def next_rate(rate: float, direction: int) -> float:
    """Returns the next learning rate above (1) or below (-1) on the scale 1, 3, 10, 30, ...

    >>> next_rate(0.01, 1), next_rate(0.03, 1), next_rate(0.01, -1), next_rate(0.02, 1)
    (0.03, 0.1, 0.003, 0.1)
    """
    place = round(2 * math.log10(rate) + direction)
    return float(f"{(3 if place % 2 else 1)}e{place // 2}")


def _best(rows: Collection[Row]) -> float:
    return max(rows, key=lambda row: (row["score"], -row["loss"]))["learning_rate"]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Returns the mean and the standard deviation of a sample, which one value alone does not have.

    >>> mean_and_deviation([80.0, 81.0, 82.0]), mean_and_deviation([80.0]), mean_and_deviation([80.0, math.nan])
    ('81.0 ± 1.0', '80.0', '1 of 2 diverged')
    """
    if diverged := sum(map(math.isnan, values)):
        return f"{diverged} of {len(values)} diverged"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def measure(run: Run, config: RunConfig, root: Path, interruption: Interruption) -> Row:
    """Makes a run, or goes on with it, and returns its row.

    One that diverges has a row too: a search the worst of all scores, a final run NaN.

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
        print(f"{error}: this run counts as diverged", flush=True)
        score = -math.inf if run.part == "search" else math.nan
        measured = {"metric": "", "score": score, "loss": math.inf, "trainable": 0, "steps": 0, "seconds": 0.0}
        return {**run._asdict(), **measured}
    metric = result["metric"].removeprefix("test_")
    if run.part == "search":
        measured = list(read_metrics(folder))[-1]
        score, loss = _first(measured, "holdout_", ""), measured["holdout_loss"]
    else:
        # Of several splits for testing, as MNLI has, the first one counts.
        score, loss = result["metrics"][result["metric"]], _first(result["metrics"], "", "_loss")
    return {
        **run._asdict(),
        "metric": metric,
        "score": round(score, 6),
        "loss": round(loss, 6),
        "trainable": result["parameters"]["trainable"],
        "steps": result["steps"],
        "seconds": result["seconds"],
    }


def _first(values: Mapping[str, float], prefix: str, suffix: str) -> float:
    return next(value for name, value in values.items() if name.startswith(prefix) and name.endswith(suffix))


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

    Raises:
        InterruptedRunError: when it was stopped, in a run or between two.
    """
    use_compilation_cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    began = time.monotonic()
    with Interruption() as interruption:
        while not (only_report or interruption.signal) and (run := grid.next_run(rows)):
            after = f"after {time.monotonic() - began:.0f} s"
            print(f"\n== run {grid.done(rows) + 1} of {grid.size(rows)}, {after}: {run}", flush=True)
            add_row(path, make(run, interruption))
            rows = read_rows(path)
            report(rows)
    report(rows)
    if interruption.signal:
        made = f"{grid.done(rows)} of {grid.size(rows)} runs are in {path}"
        raise InterruptedRunError(f"stopped: {made}; the same command goes on", 128 + interruption.signal)
