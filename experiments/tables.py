"""Helpers of the experiments to read and write csv files, to make markdown tables, and to draw pictures."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.grid import Grid
from experiments.rows import Row


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file. Each row maps the names of columns to strings."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows to a csv file with a header line. Floating-point numbers get six significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])


def markdown(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return a markdown table of some rows.

    Args:
        rows: The rows, which map keys to values. If a key is missing or its value is None, the cell is empty.
        columns: The format specification of each column, by key. Other keys of the rows are not shown. A column with a
            non-empty specification is right-aligned.

    >>> print(markdown([{"a": "x", "b": 0.123}], {"a": "", "b": ".1%"}))
    | a | b |
    |---|---:|
    | x | 12.3% |
    """
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join('---:' if spec else '---' for spec in columns.values())}|"]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and the standard deviation of some scores as text.

    A score is NaN if its run diverged. If there is any, the text says how many.

    >>> mean_and_deviation([80.0, 81.0, 82.0]), mean_and_deviation([80.0]), mean_and_deviation([80.0, math.nan])
    ('81.0 ± 1.0', '80.0', '1 of 2 diverged')
    """
    if diverged := sum(map(math.isnan, values)):
        return f"{diverged} of {len(values)} diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def score_table(grid: Grid, rows: Sequence[Row], mean: bool = True) -> str:
    """Return a markdown table of test scores, with a line for each method and a column for each task.

    A cell shows the mean and the standard deviation over seeds in percent. If final runs of some seeds are missing, the
    cell also shows how many are finished. If all are missing, the cell is empty.

    Args:
        grid: The grid whose methods and tasks are shown.
        rows: All rows of finished runs so far.
        mean: Whether to add a last column with the mean over all tasks.
    """
    metrics, lines = grid.metrics(rows), []
    for method in grid.rates:
        cells = {task: grid.scores(rows, task, method) for task in metrics}
        line: dict[str, Any] = {"method": method, "trained": grid.trained(rows, method)}
        for task, scores in cells.items():
            lacking = f" ({len(scores)} of {len(grid.seeds)} seeds)" if len(scores) < len(grid.seeds) else ""
            line[f"{task} ({metrics[task]})"] = mean_and_deviation(scores) + lacking if scores else None
        whole = [s for s in cells.values() if len(s) == len(grid.seeds) and not any(map(math.isnan, s))]
        if whole and len(whole) == len(grid.tasks):
            line["mean"] = f"{statistics.mean(map(statistics.mean, whole)):.1f}"
        lines.append(line)
    tasks = [f"{task} ({metric})" for task, metric in metrics.items()] + ["mean"] * mean
    return markdown(lines, {"method": "", "trained": ","} | dict.fromkeys(tasks, ">"))


def rate_table(grid: Grid, rows: Sequence[Row]) -> str:
    """Return a markdown table of the learning rates tried for each method, and of the rate chosen for each task.

    A star marks a chosen rate that is the smallest or the largest one tried. A dash marks a search in which all rates
    had the same score.
    """
    tasks, lines = (grid.searched,) if grid.searched else grid.tasks, []
    for method in grid.rates:
        line, rates = {"method": method}, {*grid.rates[method]}
        for task in tasks:
            tried, best = grid.searches(rows, task, method), grid.best_rate(rows, task, method)
            rates |= {*grid.rates_to_try(rows, task, method)}
            mark = " *" if best in (min(tried, default=None), max(tried, default=None)) else ""
            mark = " -" if len(tried) > 1 and len({row["score"] for row in tried.values()}) == 1 else mark
            line[task] = "" if best is None else f"{best:g}{mark}"
        lines.append(line | {"tried": ", ".join(f"{rate:g}" for rate in sorted(rates))})
    return markdown(lines, {"method": "", "tried": ""} | dict.fromkeys(tasks, ">"))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty matplotlib figure of this size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Give a panel light grid lines, and remove its frame at the top and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_scores(axes: Axes, grid: Grid, rows: Sequence[Row], task: str, methods: Iterable[str]) -> None:
    """Draw the test scores of methods on one task, in a horizontal row for each method, from top to bottom.

    A row has a dot for the score of each seed and a bar at their mean.
    """
    methods = list(methods)
    for place, method in enumerate(methods):
        values = grid.scores(rows, task, method)
        line = axes.plot(values, [place] * len(values), "o", ms=5, alpha=0.7)[0]
        if values:
            axes.plot(statistics.mean(values), place, "|", ms=16, mew=2.5, color=line.get_color())
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    tidy(axes)


def draw_counts(axes: Axes, grid: Grid, rows: Sequence[Row], task: str) -> None:
    """Draw the test scores of all methods on one task against the number of parameters that they train.

    A method has a dot for the score of each seed and a bar at their mean.
    """
    for place, method in enumerate(grid.rates):
        values, color = grid.scores(rows, task, method), f"C{place}"
        if values:
            count = next(row["trainable"] for row in rows if (row["task"], row["method"]) == (task, method))
            axes.plot([count] * len(values), values, "o", ms=4, alpha=0.7, color=color)
            axes.plot(count, statistics.mean(values), "_", ms=18, mew=2.5, color=color, label=method)
    axes.set_xscale("log")
    axes.set_title(task, fontsize=10)
    axes.set_xlabel("trained parameters, with the head")
    axes.set_ylabel("test accuracy, %")
    tidy(axes)
