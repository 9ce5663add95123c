"""Four methods on the embedded digits job, three seeds each: a table and a picture.

    python -m experiments.digits_methods

Runs `configs/digits.py` for each of linear_probe, lora, circulant and full (in `runs/digits_methods/`; what is complete
is not run again) and writes `experiments/results/digits_methods.csv`, `.md` and `.png`.

    python -m experiments.digits_methods --search

compares learning rates for `configs/digits.py`, three for each of them, by the accuracy on 150 held-out training images
(mean of two seeds, runs in `runs/digits_search/`), and writes `experiments/results/digits_search.md`.
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs import digits
from experiments.command import command
from surm_jax.record.metrics import read_metrics
from surm_jax.training import parse
from surm_jax.training.modes import train_run

METHODS = ("linear_probe", "lora", "circulant", "full")
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"
SEARCH_SEEDS = (10, 11)
# Times the middle of each method's grid: what trains few numbers bears larger steps than what trains all.
GRID = (0.3, 1.0, 3.0)
MIDDLE = {"linear_probe": 1e-1, "lora": 2e-2, "circulant": 1e-2, "full": 1e-3}


def run_all() -> dict[str, dict[str, Any]]:
    """Returns the combined result of every method."""
    results = {}
    for method in METHODS:
        config = digits.get_config()
        config.seeds, config.peft.method = SEEDS, method
        results[method] = train_run(parse(config), Path("runs/digits_methods") / method)
    return results


def search() -> None:
    """Measures the accuracy on held-out training images for every method and learning rate."""
    lines = ["| method | learning rate | held-out accuracy |", "|---|---:|---:|"]
    for method in METHODS:
        for factor in GRID:
            config = digits.get_config()
            config.seeds, config.peft.method, config.data.holdout = SEARCH_SEEDS, method, 150
            rate = config.optim.learning_rate[method] = MIDDLE[method] * factor
            workdir = Path("runs/digits_search") / f"{method}-{rate:g}"
            train_run(parse(config), workdir)
            last = [list(read_metrics(workdir / f"seed-{seed}"))[-1]["holdout_accuracy"] for seed in SEARCH_SEEDS]
            lines.append(f"| {method} | {rate:g} | {100 * statistics.mean(last):.1f} % |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "digits_search.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def write_tables(results: dict[str, dict[str, Any]]) -> None:
    """Writes one row per run as csv, and one per method as markdown."""
    with (RESULTS / "digits_methods.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["method", "seed", "trainable", "total", "test_accuracy"])
        for method, result in results.items():
            counts = result["parameters"]
            for seed, accuracy in zip(result["seeds"], result["metrics"]["test_accuracy"]["seeds"], strict=True):
                rows.writerow([method, seed, counts["trainable"], counts["total"], f"{accuracy:.6f}"])
    lines = ["| method | trained | share | test accuracy | adapter |", "|---|---:|---:|---:|---:|"]
    for method, result in results.items():
        counts, accuracy = result["parameters"], result["metrics"]["test_accuracy"]
        lines.append(
            f"| {method} | {counts['trainable']:,} | {100 * counts['trainable'] / counts['total']:.2f} %"
            f" | {100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %"
            f" | {result['adapter_bytes'] / 1000:,.1f} kB |"
        )
    (RESULTS / "digits_methods.md").write_text("\n".join(lines) + "\n")


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draws accuracy against the number of trained parameters, with a dot for every seed."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, result in results.items():
        trainable, accuracy = result["parameters"]["trainable"], result["metrics"]["test_accuracy"]
        line = axes.plot(trainable, 100 * accuracy["mean"], "_", ms=18, mew=2.5, label=method)[0]
        axes.plot(
            [trainable] * len(SEEDS), [100 * value for value in accuracy["seeds"]], "o", ms=4, color=line.get_color()
        )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Digits 5 to 9 after pretraining on 0 to 4 (bar: mean of three seeds)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(RESULTS / "digits_methods.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--search", action="store_true", help="compare learning rates instead")
    if parser.parse_args(arguments).search:
        search()
        return
    results = run_all()
    RESULTS.mkdir(exist_ok=True)
    write_tables(results)
    draw(results)
    print((RESULTS / "digits_methods.md").read_text())


if __name__ == "__main__":
    command(main)
