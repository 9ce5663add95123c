"""Compute differences between the scores of methods, with their 95 % confidence intervals over seeds.

    python -m experiments.differences

This command reads the rows of finished runs in `experiments/results/` and prints the table that is shown in
`experiments/results/README.md`. It trains nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from experiments.grid import RESULTS, Grid
from experiments.rows import read_rows
from experiments.tables import markdown, mean_and_deviation

GLUE = ("stsb", "mrpc", "cola", "rte")


class Difference(NamedTuple):
    """A difference of two means with its 95 % confidence interval.

    Attributes:
        value: The difference.
        error: Half the width of the confidence interval.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return "unknown: runs diverged" if math.isnan(self.value) else f"{self.value:+.1f} ± {self.error:.1f}"


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the difference of two means over seeds, and its confidence interval.

    The interval is that of Welch's t-test, which does not assume that both samples have the same variance.

    >>> print(difference([3.0, 4.0, 5.0], [1.0, 1.5, 2.0]))
    +2.5 ± 2.1
    """
    value = statistics.mean(first) - statistics.mean(second)
    if len({*first}) == len({*second}) == 1:
        # If both samples have the variance zero, Welch's degrees of freedom are 0 / 0.
        return Difference(value, 0.0)
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return Difference(value, (high - low) / 2)


class Cell(NamedTuple):
    """One method on some tasks of a grid, whose scores are compared with those of another cell.

    Attributes:
        grid: The name of the grid's csv file in `experiments/results/`, without its suffix.
        tasks: The tasks. If there are several, the scores of each seed are averaged over them.
        method: The name of the method.
    """

    grid: str
    tasks: tuple[str, ...]
    method: str


COMPARISONS: Mapping[str, tuple[Cell, Cell]] = {
    **{
        f"images: {method} - LoRA": (
            Cell("image_table_cifar", ("cifar10",), method),
            Cell("image_table_cifar", ("cifar10",), "lora"),
        )
        for method in ("circulant", "toeplitz", "kronecker")
    },
    **{
        f"images: full with all data - circulant with {share}": (
            Cell("low_data_cifar", ("100%",), "full"),
            Cell("low_data_cifar", (share,), "circulant"),
        )
        for share in ("2%", "20%")
    },
    "images: full - linear probe, all data": (
        Cell("low_data_cifar", ("100%",), "full"),
        Cell("low_data_cifar", ("100%",), "linear_probe"),
    ),
    **{
        f"GLUE mean: {first} - {second}": (Cell("glue_minilm", GLUE, first), Cell("glue_minilm", GLUE, second))
        for first, second in (
            ("bottleneck", "circulant_adapter"),
            ("circulant", "toeplitz"),
            ("circulant", "kronecker"),
            ("circulant", "lora"),
        )
    },
    "GLUE mean without CoLA: bottleneck - circulant_adapter": (
        Cell("glue_minilm", ("stsb", "mrpc", "rte"), "bottleneck"),
        Cell("glue_minilm", ("stsb", "mrpc", "rte"), "circulant_adapter"),
    ),
    "digits: circulant on Q, K, V - on Q, V": (
        Cell("ablations_digits", ("digits",), "circulant, Q K V"),
        Cell("ablations_digits", ("digits",), "circulant, Q V"),
    ),
    **{
        f"digits: {family} adapter with bias - without": (
            Cell("ablations_digits", ("digits",), family),
            Cell("ablations_digits", ("digits",), f"{family}, no bias"),
        )
        for family in ("circulant", "toeplitz", "kronecker")
    },
}


def scores(cell: Cell) -> list[float]:
    """Return the test scores of a cell in percent, one for each seed, at the learning rate that the search chose."""
    rows = read_rows(RESULTS / f"{cell.grid}.csv")
    searched = {row["task"] for row in rows if row["part"] == "search"}
    # If the grid has searches on a single task, their learning rates are used for all tasks.
    grid = Grid.of_rows(rows, searched.pop() if len(searched) == 1 else "")
    by_task = [grid.scores(rows, task, cell.method) for task in cell.tasks]
    return [statistics.mean(values) for values in zip(*by_task, strict=True)]


def tables() -> dict[str, str]:
    """Return the table "differences" in markdown, with a line for each entry of `COMPARISONS`."""
    rows = []
    for title, cells in COMPARISONS.items():
        first, second = map(scores, cells)
        shown = {"first": mean_and_deviation(first), "second": mean_and_deviation(second)}
        rows.append({"first - second": title, **shown, "difference": str(difference(first, second))})
    columns = {"first - second": ""} | dict.fromkeys(("first", "second", "difference"), ">")
    return {"differences": markdown(rows, columns)}


if __name__ == "__main__":
    print(tables()["differences"])
