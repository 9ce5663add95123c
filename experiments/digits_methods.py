"""Compare four fine-tuning methods on handwritten digits 5 to 9, with three seeds each.

    python -m experiments.digits_methods

Every run uses `configs/digits.py` and fine-tunes the small ViT that the package contains. The runs form a grid
(`experiments/grid.py`) whose rows are in `experiments/results/digits_methods.csv`. The searches for a learning rate
hold out 150 training images. With `--report` the command starts no run. It shows the tables and the picture of the runs
that are finished.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs import digits
from experiments import grid
from experiments.command import command
from experiments.grid import RESULTS, Grid
from experiments.rows import Run, note_settings, read_rows
from experiments.tables import draw_counts, new_figure, rate_table, score_table
from surm_jax.training import parse
from surm_jax.training.config import RunConfig

RUNS = Path("runs/digits_methods")
HOLDOUT = 150
GRID = Grid(
    tasks=("digits",),
    rates={
        "linear_probe": (0.03, 0.1, 0.3),
        "lora": (0.006, 0.02, 0.06),
        "circulant": (0.003, 0.01, 0.03),
        "full": (0.0003, 0.001, 0.003),
    },
    seeds=(0, 1, 2),
)


def config_of(run: Run) -> RunConfig:
    """Return the training configuration of one run of the grid."""
    config = digits.get_config()
    config.seeds, config.peft.method = (run.seed,), run.method
    config.optim.learning_rate[run.method] = run.learning_rate
    if run.part == "search":
        config.data.holdout = HOLDOUT
    return parse(config)


def tables() -> dict[str, str]:
    """Return the tables "scores" (test accuracies) and "rates" (learning rates) in markdown."""
    rows = read_rows(RESULTS / "digits_methods.csv")
    return {"scores": score_table(GRID, rows, mean=False), "rates": rate_table(GRID, rows)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs of the grid that are not finished yet, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="start no run, only report")
    path = RESULTS / "digits_methods.csv"
    if not parser.parse_args(arguments).report:
        note_settings(path, {"config": "configs/digits.py", "holdout": HOLDOUT})
        grid.work(GRID, path, config_of, RUNS)
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    draw_counts(axes, GRID, read_rows(path), "digits")
    axes.set_title("Digits 5 to 9 after pretraining on 0 to 4 (bar: mean of three seeds)", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path.with_suffix(".png"), dpi=150)
    print("\n\n".join(tables().values()))


if __name__ == "__main__":
    command(main)
