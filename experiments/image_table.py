r"""Compare methods on images with one backbone, as in Tables 1 and 2 (VTAB-1k) and Figure 7 of arXiv 2406.17740.

    python -m experiments.image_table --data=FOLDER_OF_PREPARED_TFDS_SETS

This command takes the model of `experiments.pretrain_cifar` and fine-tunes it, with each of eight methods, on the five
classes of CIFAR-10 that it never saw. A run takes 200 steps of 64 images, which is half a pass over the 25,000 images
of these classes. All runs together take about 15 minutes on two CPU cores. Other backbones and data sets are options:

    python -m experiments.image_table --name=vit_b --model=augreg --variant=B/16 --steps=20000 \\
        --sets cifar10 cifar100 dtd --methods circulant lora full --rates circulant=2e-5,5e-5,2e-4 \\
        --data=FOLDER_OF_PREPARED_TFDS_SETS

With `--vtab`, every method trains on the same 1,000 training examples of each data set. The searches for a learning
rate train on 800 of them and hold out 200, and the final runs train on all.

The runs form a grid (`experiments/grid.py`) whose rows are in `experiments/results/image_table_NAME.csv`. All methods
train for the same number of steps with the same optimiser and a new head. The learning rate is the only setting that is
searched for each method. A later command may add data sets, methods, learning rates and seeds to the same csv file.
With `--report` the command starts no run. It shows the tables and the picture of the runs that are finished.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments import image_grid
from experiments.command import command
from experiments.grid import RESULTS, Grid
from experiments.image_grid import RATES, Source
from experiments.rows import Row, read_rows, read_settings
from experiments.tables import draw_counts, new_figure, rate_table, score_table

RUNS = Path("runs/image_table")
VTAB_EXAMPLES = 1000


def tables(name: str = "cifar") -> dict[str, str]:
    """Return the tables "scores" (test accuracies) and "rates" (learning rates) in markdown.

    Args:
        name: The value of `--name` that the rows were made with.
    """
    rows = read_rows(RESULTS / f"image_table_{name}.csv")
    whole = Grid.of_rows(rows, order=RATES)
    return {"scores": score_table(whole, rows), "rates": rate_table(whole, rows)}


def draw(whole: Grid, rows: Sequence[Row], path: Path) -> None:
    """Draw the test accuracy against the number of trained parameters, in a panel for each data set."""
    across = max(1, min(len(whole.tasks), 3))
    down = max(1, -(-len(whole.tasks) // across))
    figure = new_figure(4.6 * across + 1.6, 3.4 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(whole.tasks) :]:
        axes.remove()
    handles = {}
    for axes, task in zip(panels, whole.tasks, strict=False):
        draw_counts(axes, whole, rows, task)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs of the grid that are not finished yet, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    image_grid.add_options(parser)
    parser.add_argument("--vtab", action="store_true", help=f"use {VTAB_EXAMPLES:,} training examples of each set")
    options = parser.parse_args(arguments)
    path = RESULTS / f"image_table_{options.name}.csv"
    if options.report:
        read_settings(path)
    else:
        sets = options.sets or ["cifar10"]
        sizes = {name: image_grid.count_images(name, options) for name in sets}
        sources = {name: Source(name, VTAB_EXAMPLES if options.vtab else size) for name, size in sizes.items()}
        about = f"{VTAB_EXAMPLES:,} training examples of each set" if options.vtab else "all training examples"
        image_grid.work(options, path, RUNS, sources, about, sets)
    rows = read_rows(path)
    draw(Grid.of_rows(rows, order=RATES), rows, path.with_suffix(".png"))
    print("\n\n".join(tables(options.name).values()))


if __name__ == "__main__":
    command(main)
