"""What the pictures of grids share: the scores of all methods on a task, a dot for every seed."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from experiments.grid import Grid
from experiments.rows import Row


def draw_scores(axes: Axes, grid: Grid, rows: Sequence[Row], task: str, methods: Sequence[str] | Mapping) -> None:
    """Draws each method as a line of dots, one for every seed, with a bar for their mean; what diverged is left out.

    Args:
        axes: to draw on; the methods go from top to bottom.
        grid: that the rows are of.
        rows: of all runs so far.
        task: whose scores are drawn.
        methods: names in `grid.rates`.
    """
    for place, method in enumerate(methods):
        values = grid.scores(rows, task, method)
        line = axes.plot(values, [place] * len(values), "o", ms=5, alpha=0.7)[0]
        if values:
            axes.plot(statistics.mean(values), place, "|", ms=16, mew=2.5, color=line.get_color())
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
