r"""How much data each method needs: accuracy against the share of the training set that is used, the paper's Figure 6.

    python -m experiments.low_data --data=FOLDER_OF_PREPARED_TFDS_SETS

adapts what `pretrain_cifar.py` made to the five classes of CIFAR-10 that it never saw, with 1, 2, 5, 10, 20 and 100 %
of their 25,000 images. A share is the same images for every method and seed, and all of the smaller ones are in it.
With a backbone and sets of your own, each a table and a picture:

    python -m experiments.low_data --name=clip --model=hf://openai/clip-vit-base-patch16 --sets dtd sun397 \\
        --steps=2000 --data=FOLDER_OF_PREPARED_TFDS_SETS

What made all of it but the bottleneck fit into 71 minutes on two CPU cores: 200 steps of 64 images in every run,
whatever the share (so few images are seen often, and all of them not even once), and one search per method for its
learning rate, the best of three or more by the accuracy on held-out images, with a tenth of the data (2,000 images and
500 held out) instead of one for every share. What counts is the accuracy on the whole test set after the last step of
three other seeds.

Every finished run is a row of `experiments/results/low_data_NAME.csv`, with `--sets` of `low_data_NAME_SET.csv`, and is
not made again: the command goes on where it was stopped, and with more shares, methods or rates it makes what is
missing. Two processes may share the work, each with `--methods` of its own. `--report` only draws the table and the
picture of the rows that are there.
"""

import argparse
import dataclasses
import re
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
from surm_jax.errors import UserError
from surm_jax.record.progress import Interruption

RESULTS = grid.RESULTS
RUNS = Path("runs/low_data")
# In percent of the training set.
FRACTIONS = (1.0, 2.0, 5.0, 10.0, 20.0, 100.0)
SEARCHED = 10.0


def task_of(fraction: float) -> str:
    """Returns the name of the task to learn from so many percent.

    >>> task_of(0.5), task_of(20.0)
    ('0.5%', '20%')
    """
    return f"{fraction:g}%"


def fraction_of(task: str) -> float:
    """Returns the percent in the name of a task."""
    return float(task.removesuffix("%"))


def examples_of(fraction: float, examples: int) -> int:
    """Returns how many of so many training examples a share is.

    >>> examples_of(1.0, 25_000), examples_of(100.0, 25_000)
    (250, 25000)

    Raises:
        UserError: if it is no share, or so small that nothing can be learned and held out.
    """
    if not 0 < fraction <= 100:
        raise UserError(f"--fractions are percent of the training set, above 0 and up to 100, got {fraction:g}")
    count = round(fraction / 100 * examples)
    if count < 5:
        searched = ", with which the learning rates are chosen" if fraction == SEARCHED else ""
        raise UserError(f"{fraction:g} %{searched}: {count} of {examples} training examples are too few")
    return count


def draw(whole: Grid, rows: Sequence[Row], path: Path) -> None:
    """Draws accuracy against the share, a line for every method: means, and bars of one standard deviation."""
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in whole.rates:
        cells = {task: whole.scores(rows, task, method) for task in whole.tasks}
        cells = {task: values for task, values in cells.items() if values}
        if cells:
            axes.errorbar(
                [fraction_of(task) for task in cells],
                [statistics.mean(values) for values in cells.values()],
                [statistics.stdev(values) if len(values) > 1 else 0.0 for values in cells.values()],
                marker="o",
                ms=4,
                capsize=2,
                label=f"{method} ({whole.trained(rows, method):,})",
            )
    axes.set_xscale("log")
    fractions = [fraction_of(task) for task in whole.tasks]
    axes.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
    axes.minorticks_off()
    axes.set_xlabel("training examples used, %")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            title="method (numbers trained)", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    figure.savefig(path, dpi=150)


def report(whole: Grid, rows: Sequence[Row], settings: Settings, path: Path) -> None:
    """Writes the table and the picture beside the rows."""
    whole = dataclasses.replace(whole, tasks=tuple(sorted(whole.tasks, key=fraction_of)))
    text = f"""# Little data: {path.stem.removeprefix("low_data_")}

By `python -m experiments.low_data`. {image_grid.describe(settings)}

A column is the share of the training examples that was learned from. {len(whole.seeds)} seeds, mean ± standard
deviation on the test set, in percent; `trained` counts the head. Empty: not measured yet. Every run is in
`{path.name}`.

{whole.table(rows, mean=False)}
![accuracy against the share of the training set]({path.stem}.png)

Learning rates, chosen by the accuracy on held-out training examples with {SEARCHED:g} % of the data, for all shares:
of three, and of more where the best was at an end. *: still at an end of what was tried. -: all gave the same accuracy,
and the loss decided.

{whole.rates_table(rows)}"""
    path.with_suffix(".md").write_text(text)
    draw(whole, rows, path.with_suffix(".png"))


def sizes_of(options: argparse.Namespace, name: str) -> tuple[int, dict[str, int]]:
    """Returns how many training examples a set has, and how many each share of it is.

    Raises:
        UserError: if the set is not there, or a share cannot be.
    """
    examples = len(image_grid.load_images(name, options.data, image_grid.classes_of(options, options.sets)).train)
    return examples, {task_of(share): examples_of(share, examples) for share in (*options.fractions, SEARCHED)}


def make_missing(options: argparse.Namespace, name: str, path: Path) -> None:
    """Makes the runs on a set that are asked for and have no row yet, and reports after each."""
    rates, (examples, sizes) = image_grid.rates_of(options), sizes_of(options, name)
    classes = image_grid.classes_of(options, options.sets)
    settings = image_grid.settings_of(options, classes, f"{examples:,} training examples of {name}")
    note_settings(path, dataclasses.asdict(settings))
    runs = image_grid.runs_of(RUNS, path.stem.removeprefix("low_data_"), settings)

    def make(run: Run, interruption: Interruption) -> Row:
        config = image_grid.run_config(settings, run, name, options.data, sizes[run.task])
        return grid.measure(run, config, runs, interruption)

    asked = Grid(tuple(map(task_of, options.fractions)), rates, tuple(options.seeds), task_of(SEARCHED))
    grid.work(asked, path, make, lambda rows: report(image_grid.extended(asked, rows), rows, settings, path))


def paths_of(name: str, sets: Sequence[str]) -> dict[str, Path]:
    """Returns where the rows of every set are; of the five classes of CIFAR-10, if none is asked for.

    >>> [path.name for path in paths_of("clip", ["dtd", "glue/x"]).values()], paths_of("small", [])["cifar10"].name
    (['low_data_clip_dtd.csv', 'low_data_clip_glue_x.csv'], 'low_data_small.csv')
    """
    if not sets:
        return {"cifar10": RESULTS / f"low_data_{name}.csv"}
    return {one: RESULTS / f"low_data_{name}_{re.sub('[^A-Za-z0-9.-]', '_', one)}.csv" for one in sets}


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is missing of the grid, or only reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    image_grid.add_options(parser)
    parser.add_argument("--sets", nargs="+", default=[], help="as config.data.name; none: five classes of CIFAR-10")
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS, help="in percent of the training set")
    options = parser.parse_args(arguments)
    paths = paths_of(options.name, options.sets)
    if options.report:
        for path in paths.values():
            rows = read_rows(path)
            whole = image_grid.extended(Grid((), {}, (), task_of(SEARCHED)), rows)
            report(whole, rows, image_grid.settings_there(path), path)
    else:
        # What cannot be, of any set, is said before the first is trained on.
        for name in paths:
            sizes_of(options, name)
        for name, path in paths.items():
            make_missing(options, name, path)
    for path in paths.values():
        print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    command(main)
