r"""Measure how the accuracy of each method depends on the size of the training set (Figure 6 of arXiv 2406.17740).

    python -m experiments.low_data --data=FOLDER_OF_PREPARED_TFDS_SETS

This command takes the model of `experiments.pretrain_cifar` and fine-tunes it on the five classes of CIFAR-10 that it
never saw, with 1, 2, 5, 10, 20 and 100 % of their 25,000 training images. All methods and seeds use the same images of
a share, and a larger share contains all images of a smaller one. Other backbones and data sets are options. Each data
set gets its own table and picture:

    python -m experiments.low_data --name=clip --model=hf://openai/clip-vit-base-patch16 --sets dtd sun397 \\
        --steps=2000 --data=FOLDER_OF_PREPARED_TFDS_SETS

The runs form a grid (`experiments/grid.py`) whose tasks are the shares. Its rows are in
`experiments/results/low_data_NAME.csv`, or in `low_data_NAME_SET.csv` with `--sets`. By default every run takes 200
steps of 64 images, whatever the share. For each method, the best learning rate is searched with 10 % of the data and
used for all shares. The whole grid without the method "bottleneck" took 71 minutes on two CPU cores. A later command
may add shares, methods, learning rates and seeds to the same csv file. With `--report` the command starts no run. It
shows the tables and the picture of the runs that are finished.
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments import image_grid
from experiments.command import command
from experiments.grid import RESULTS, Grid
from experiments.image_grid import RATES, Source
from experiments.rows import Row, read_rows, read_settings
from experiments.tables import new_figure, rate_table, score_table, tidy
from surm_jax.errors import UserError

RUNS = Path("runs/low_data")
# The shares that final runs use, and the share that learning rates are searched with, in percent of the training set.
SHARES = (1.0, 2.0, 5.0, 10.0, 20.0, 100.0)
SEARCHED = 10.0


def task_of(share: float) -> str:
    """Return the name of the task that trains on a share of the training set, given in percent.

    >>> task_of(0.5), task_of(20.0)
    ('0.5%', '20%')
    """
    return f"{share:g}%"


def share_of(task: str) -> float:
    """Return the share of the training set, in percent, that a name from `task_of` stands for."""
    return float(task.removesuffix("%"))


def examples_of(share: float, examples: int) -> int:
    """Return the number of training examples in a share.

    Args:
        share: The share, in percent.
        examples: The number of examples in the whole training set.

    >>> examples_of(1.0, 25_000), examples_of(100.0, 25_000)
    (250, 25000)

    Raises:
        UserError: The share is not in (0, 100], or it has fewer than 5 examples, too few to hold out a fifth.
    """
    if not 0 < share <= 100:
        raise UserError(f"--shares are percent of the training set, above 0 and up to 100, got {share:g}")
    count = round(share / 100 * examples)
    if count < 5:
        searched = ", the share of the searches" if share == SEARCHED else ""
        raise UserError(f"{share:g} %{searched}: {count} of {examples} training examples are too few")
    return count


def grid_of(rows: Sequence[Row]) -> Grid:
    """Return the grid that some rows belong to, with the tasks in the order of their shares, the smallest first."""
    whole = Grid.of_rows(rows, task_of(SEARCHED), RATES)
    return Grid(tuple(sorted(whole.tasks, key=share_of)), whole.rates, whole.seeds, whole.searched)


def tables(name: str = "cifar") -> dict[str, str]:
    """Return the tables "scores" (test accuracies) and "rates" (learning rates) in markdown.

    Args:
        name: The name of the grid, as in `names_of`.
    """
    rows = read_rows(RESULTS / f"low_data_{name}.csv")
    return {"scores": score_table(grid_of(rows), rows, mean=False), "rates": rate_table(grid_of(rows), rows)}


def draw(whole: Grid, rows: Sequence[Row], path: Path) -> None:
    """Draw the test accuracy against the share of the training set, with a line for each method.

    Error bars show one standard deviation over seeds.
    """
    figure = new_figure(7.4, 4.2)
    axes = figure.subplots()
    for method in whole.rates:
        cells = {task: whole.scores(rows, task, method) for task in whole.tasks}
        cells = {task: values for task, values in cells.items() if values}
        if cells:
            axes.errorbar(
                [share_of(task) for task in cells],
                [statistics.mean(values) for values in cells.values()],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for values in cells.values()],
                marker="o",
                ms=4,
                capsize=2,
                label=f"{method} ({whole.trained(rows, method):,})",
            )
    axes.set_xscale("log")
    shares = [share_of(task) for task in whole.tasks]
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("training examples used, %")
    axes.set_ylabel("test accuracy, %")
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        title, outside = "method (numbers trained)", {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axes.legend(title=title, frameon=False, fontsize=8, **outside)
    figure.savefig(path, dpi=150)


def names_of(name: str, sets: Sequence[str]) -> dict[str, str]:
    """Return the name of the grid for each data set, which is part of the names of its files of results.

    A character that does not belong in a file's name, such as "/", is replaced by "_".

    Args:
        name: The value of `--name`.
        sets: The values of `--sets`. If there are none, the data set is CIFAR-10, and its grid is called `name`.

    >>> names_of("clip", ["dtd", "glue/x"]), names_of("small", [])
    ({'dtd': 'clip_dtd', 'glue/x': 'clip_glue_x'}, {'cifar10': 'small'})
    """
    if not sets:
        return {"cifar10": name}
    return {one: f"{name}_{re.sub('[^A-Za-z0-9.-]', '_', one)}" for one in sets}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs of the grids that are not finished yet, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    image_grid.add_options(parser)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="in percent of the training set")
    options = parser.parse_args(arguments)
    names, sources, counts = names_of(options.name, options.sets), {}, {}
    if not options.report:
        # Load all data sets first, so that an error in any of them is reported before the first training run.
        for one in names:
            counts[one] = image_grid.count_images(one, options)
            shares = dict.fromkeys((*options.shares, SEARCHED))
            sources[one] = {task_of(share): Source(one, examples_of(share, counts[one])) for share in shares}
    for one, name in names.items():
        path = RESULTS / f"low_data_{name}.csv"
        if options.report:
            read_settings(path)
        else:
            about, tasks = f"{counts[one]:,} training examples of {one}", [task_of(share) for share in options.shares]
            image_grid.work(options, path, RUNS, sources[one], about, tasks, task_of(SEARCHED))
        rows = read_rows(path)
        draw(grid_of(rows), rows, path.with_suffix(".png"))
        print("\n\n".join(tables(name).values()))


if __name__ == "__main__":
    command(main)
