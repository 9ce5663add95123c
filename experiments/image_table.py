r"""Sets of images with one backbone and any methods: the paper's Table 1 and Figure 7, and VTAB-1k of its Table 2.

    python -m experiments.image_table --data=FOLDER_OF_PREPARED_TFDS_SETS

adapts what `pretrain_cifar.py` made to the five classes of CIFAR-10 that it never saw, with all their 25,000 images, in
200 steps of 64 (half a pass): some 15 minutes on two CPU cores. With a backbone and sets of your own:

    python -m experiments.image_table --name=vit_b --model=augreg --variant=B/16 --steps=20000 \\
        --sets cifar10 cifar100 dtd --methods circulant lora full --rates circulant=2e-5,5e-5,2e-4 \\
        --data=FOLDER_OF_PREPARED_TFDS_SETS

`--vtab` trains on 1,000 examples of each set, the same ones for every method: 800 and 200 for the learning rate, then
all.

Every method makes as many steps, with the same optimiser, a new head and no tuning but its learning rate: the best of
three or more by the accuracy on training examples that are held out (one seed). What counts is the test set after the
last step of three other seeds. Every finished run is a row of `experiments/results/image_table_NAME.csv` and is not
made again: the command goes on where it was stopped, and with more sets, methods or rates it makes what is missing. Two
processes may share the work, each with `--methods` of its own. `--report` only draws the table and the picture of the
rows that are there.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import grid, image_grid
from experiments.command import command
from experiments.grid import Grid
from experiments.image_grid import Settings
from experiments.rows import Row, Run, note_settings, read_rows
from surm_jax.record.progress import Interruption

RESULTS = grid.RESULTS
RUNS = Path("runs/image_table")
VTAB_EXAMPLES = 1000


def draw(whole: Grid, rows: Sequence[Row], path: Path) -> None:
    """Draws every set as a panel: accuracy against trained parameters, a dot for every seed, a bar for their mean."""
    tasks = whole.tasks
    across = max(1, min(len(tasks), 3))
    down = max(1, -(-len(tasks) // across))
    figure = Figure(figsize=(4.6 * across + 1.6, 3.4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(tasks) :]:
        axes.remove()
    for axes, task in zip(panels, tasks, strict=False):
        for place, method in enumerate(whole.rates):
            values, color = whole.scores(rows, task, method), f"C{place}"
            if not values:
                continue
            count = next(row["trainable"] for row in rows if (row["task"], row["method"]) == (task, method))
            axes.plot([count] * len(values), values, "o", ms=4, alpha=0.7, color=color)
            axes.plot(count, statistics.mean(values), "_", ms=18, mew=2.5, color=color, label=method)
        axes.set_xscale("log")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("trained parameters, with the head")
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    shown = [axes.get_legend_handles_labels() for axes in panels[: len(tasks)]]
    handles = {label: handle for one in shown for handle, label in zip(*one, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def report(whole: Grid, rows: Sequence[Row], settings: Settings, path: Path) -> None:
    """Writes the table and the picture beside the rows."""
    text = f"""# Images: {path.stem.removeprefix("image_table_")}

By `python -m experiments.image_table`. {image_grid.describe(settings)}

{len(whole.seeds)} seeds, mean ± standard deviation on the test set, in percent; `trained` counts the head. Empty: not
measured yet. Every run is in `{path.name}`.

{whole.table(rows)}
![accuracy against trained parameters]({path.stem}.png)

Learning rates, chosen by the accuracy on held-out training examples, of three, and of more where the best was at an
end. *: still at an end of what was tried. -: all gave the same accuracy, and the loss decided.

{whole.rates_table(rows)}"""
    path.with_suffix(".md").write_text(text)
    draw(whole, rows, path.with_suffix(".png"))


def make_missing(options: argparse.Namespace, path: Path) -> None:
    """Makes the runs that are asked for and have no row yet, and reports after each."""
    rates, sizes = image_grid.rates_of(options), {}
    classes = image_grid.classes_of(options, options.sets)
    for task in options.sets or ("cifar10",):
        examples = len(image_grid.load_images(task, options.data, classes).train)
        sizes[task] = VTAB_EXAMPLES if options.vtab else examples
    about = f"{VTAB_EXAMPLES:,} training examples of each set" if options.vtab else "all training examples"
    settings = image_grid.settings_of(options, classes, about)
    note_settings(path, dataclasses.asdict(settings))
    runs = image_grid.runs_of(RUNS, options.name, settings)

    def make(run: Run, interruption: Interruption) -> Row:
        config = image_grid.run_config(settings, run, run.task, options.data, sizes[run.task])
        return grid.measure(run, config, runs, interruption)

    asked = Grid(tuple(sizes), rates, tuple(options.seeds))
    grid.work(asked, path, make, lambda rows: report(image_grid.extended(asked, rows), rows, settings, path))


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is missing of the grid, or only reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    image_grid.add_options(parser)
    parser.add_argument("--sets", nargs="+", default=[], help="as config.data.name; none: five classes of CIFAR-10")
    parser.add_argument("--vtab", action="store_true", help=f"{VTAB_EXAMPLES:,} training examples of each set")
    options = parser.parse_args(arguments)
    path = RESULTS / f"image_table_{options.name}.csv"
    if options.report:
        rows = read_rows(path)
        report(image_grid.extended(Grid((), {}, ()), rows), rows, image_grid.settings_there(path), path)
    else:
        make_missing(options, path)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    command(main)
