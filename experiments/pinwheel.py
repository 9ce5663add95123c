"""Measure which structured matrix can replace the hidden layer of a small network: losses, curves, decision regions.

    python -m experiments.pinwheel

This follows Figures 4 and 9 of arXiv 2406.17740. Points of the plane lie on a pinwheel of 5 spokes, one class each. A
network has a hidden layer of 64 x 64 numbers, which is replaced by a matrix of 128: LoRA of rank 1, a pair of
circulants, a pair of symmetric Toeplitz matrices, or one Toeplitz matrix (127). The bottom layer is frozen, or
everything is trained, for 2,000 epochs and with five seeds. The paper reports that the loss of LoRA stays several times
higher, and that the structured matrices reach the dense layer.

The paper leaves some choices open; they are made as follows.

- The network is `tanh(tanh(x B + b) M + m) T + t`, where `M` is the matrix itself and not an update of one. Biases are
  trained, except for that of a frozen bottom layer.
- `B` is drawn from N(0, 1) and `T` from N(0, 1/64), the same for all layers. The parameters of `M` are normal, with the
  deviation that gives the entries of `M` a variance of 1/64 too.
- Adam sees all 500 training points in each step. Its learning rate falls to 0 by a cosine. The first rate is the best
  of five, judged by the final loss on held-out points, averaged over two other seeds.
- Losses and accuracies are those after the last epoch, on the training points and on new points.
- CKA compares the hidden layer's outputs for the new points with those of the dense network of the same seed, whose
  bottom and top start alike. The dense network itself is compared with that of the next seed.

Writes `pinwheel.csv`, `pinwheel.search.csv`, `pinwheel.png` and `pinwheel_regions.png` to `experiments/results`, or to
`--out`, and prints the tables.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap

from experiments.cka import linear_cka
from experiments.command import command
from experiments.grid import RESULTS
from experiments.pinwheel_networks import LAYERS, SPOKES, Network, Points, evaluate, forward, pinwheel, starts, train
from experiments.tables import markdown, mean_and_deviation, new_figure, read_csv, tidy, write_csv
from surm_jax.record.progress import Progress

# The factor that multiplies the steps of the bottom layer.
BOTTOMS = {"frozen": 0.0, "trained": 1.0}
EPOCHS = 2000
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEEDS = (10, 11)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COLOURS = dict(zip(LAYERS, ("#4878a8", "#e0883a", "#5f9e5a", "#b8504f", "#8a6bb0"), strict=True))


class Data(NamedTuple):
    """Three draws of the same pinwheel."""

    train: Points
    held_out: Points
    test: Points


class Run(NamedTuple):
    """A trained network, its training loss by epoch, and its hidden layer's outputs for the test points."""

    layer: str
    bottom: str
    seed: int
    learning_rate: float
    numbers: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    cka: float
    curve: Float[np.ndarray, " epochs"]
    hidden: Float[np.ndarray, "points width"]
    network: Network


class Trial(NamedTuple):
    """A learning rate of the search with the mean losses of its seeds."""

    layer: str
    bottom: str
    learning_rate: float
    train_loss: float
    held_out_loss: float


def search(layer: str, bottom: str, data: Data) -> list[Trial]:
    """Try all learning rates for a layer."""
    rates, seeds = zip(*itertools.product(RATES, SEARCH_SEEDS), strict=True)
    multiples = np.full(len(seeds), BOTTOMS[bottom], np.float32)
    networks, _ = train(starts(layer, seeds), np.float32(rates), multiples, data.train, epochs=EPOCHS)
    losses = [np.asarray(evaluate(networks, points)[0], float) for points in (data.train, data.held_out)]
    means = [of_points.reshape(len(RATES), -1).mean(axis=1).tolist() for of_points in losses]
    return [Trial(layer, bottom, *values) for values in zip(RATES, *means, strict=True)]


def select(rows: Iterable[Trial | Run], layer: str, bottom: str) -> list[Trial | Run]:
    """Return the trials or runs of a layer and a kind of bottom layer."""
    return [row for row in rows if (row.layer, row.bottom) == (layer, bottom)]


def best_rate(trials: Iterable[Trial], layer: str, bottom: str) -> float:
    """Return the learning rate with the smallest loss on held-out points."""
    return min(select(trials, layer, bottom), key=lambda trial: trial.held_out_loss).learning_rate


def measure(layer: str, rate_of: dict[str, float], data: Data, dense: Sequence[Run]) -> list[Run]:
    """Train a layer with every seed and both kinds of bottom layer.

    Args:
        layer: The name of the layer.
        rate_of: The learning rate for each kind of bottom layer.
        data: The points.
        dense: The runs of the dense layer in the same order; empty while the dense layer itself is measured.
    """
    cases = list(itertools.product(BOTTOMS, SEEDS))
    rates = [rate_of[bottom] for bottom, _ in cases]
    multiples = np.float32([BOTTOMS[bottom] for bottom, _ in cases])
    begun = starts(layer, [seed for _, seed in cases])
    networks, curves = jax.device_get(train(begun, np.float32(rates), multiples, data.train, epochs=EPOCHS))
    train_loss, _, _ = jax.device_get(evaluate(networks, data.train))
    test_loss, accuracy, hidden = jax.device_get(evaluate(networks, data.test))
    # Compare with the dense network of the same seed, or compare the dense network with that of the next seed.
    next_seed = np.arange(len(cases)).reshape(len(BOTTOMS), -1)
    others = [run.hidden for run in dense] or [hidden[place] for place in np.roll(next_seed, -1, axis=1).ravel()]
    return [
        Run(
            layer,
            *case,
            learning_rate=rates[place],
            numbers=begun.hidden.num_params // len(cases),
            train_loss=float(train_loss[place]),
            test_loss=float(test_loss[place]),
            test_accuracy=float(accuracy[place]),
            cka=linear_cka(hidden[place], others[place]),
            curve=curves[place],
            hidden=hidden[place],
            network=jax.tree.map(lambda stack, place=place: stack[place], networks),
        )
        for place, case in enumerate(cases)
    ]


def measure_all(data: Data) -> tuple[list[Trial], list[Run]]:
    """Search and measure every layer, and show the progress."""
    trials, runs = [], []
    with Progress("pinwheel", len(LAYERS), 0) as progress:
        for done, layer in enumerate(LAYERS, 1):
            for bottom in BOTTOMS:
                trials += search(layer, bottom, data)
            rate_of = {bottom: best_rate(trials, layer, bottom) for bottom in BOTTOMS}
            runs += measure(layer, rate_of, data, [run for run in runs if run.layer == "dense"])
            progress.advance()
            progress.show(done, {f"{layer}, test loss": statistics.mean(run.test_loss for run in runs[-len(SEEDS) :])})
    return trials, runs


RUN_COLUMNS = Run._fields[: Run._fields.index("curve")]


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return, for each kind of bottom layer, the means over seeds and the losses of the search."""
    runs, trials = read_csv(folder / "pinwheel.csv"), read_csv(folder / "pinwheel.search.csv")
    found = {}
    for bottom in dict.fromkeys(row["bottom"] for row in runs):
        found[bottom] = run_table([row for row in runs if row["bottom"] == bottom])
        found[f"search, {bottom}"] = search_table([row for row in trials if row["bottom"] == bottom])
    return found


def run_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the table of means over seeds for every layer, with losses also as multiples of the dense layer's."""
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        line = {"layer": layer}
        for column, title in (("train_loss", "training loss"), ("test_loss", "test loss")):
            mean, dense = (statistics.mean(_values(rows, name, column)) for name in (layer, "dense"))
            line |= {title: f"{mean:.2g}", f"{title}, of dense": f"{mean / dense:.1f} x"}
        accuracy = [100 * value for value in _values(rows, layer, "test_accuracy")]
        line |= {"test accuracy, %": mean_and_deviation(accuracy)}
        line |= {"CKA": mean_and_deviation(_values(rows, layer, "cka"), digits=2)}
        line |= {"numbers": int(_values(rows, layer, "numbers")[0]), "rate": _values(rows, layer, "learning_rate")[0]}
        lines.append(line)
    losses = ("training loss", "training loss, of dense", "test loss", "test loss, of dense")
    texts = dict.fromkeys((*losses, "test accuracy, %", "CKA"), ">")
    return markdown(lines, {"layer": "", "numbers": ",", "rate": "g"} | texts)


def search_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the training and held-out losses of all learning rates, the chosen rate in bold."""
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = [row for row in rows if row["layer"] == layer]
        pairs = [f"{float(row['train_loss']):.2g} / {float(row['held_out_loss']):.2g}" for row in mine]
        best = min(range(len(mine)), key=lambda place: float(mine[place]["held_out_loss"]))
        pairs[best] = f"**{pairs[best]}**"
        lines.append({"layer": layer, **dict(zip((row["learning_rate"] for row in mine), pairs, strict=True))})
    return markdown(lines, {"layer": ""} | dict.fromkeys(list(lines[0])[1:], ">"))


def _values(rows: Sequence[Mapping[str, str]], layer: str, column: str) -> list[float]:
    return [float(row[column]) for row in rows if row["layer"] == layer]


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw the training loss by epoch, as median and range over seeds, and the CKA of every seed."""
    figure = new_figure(11, 3.8)
    *panels, alike = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    panels[1].sharey(panels[0])
    for axes, bottom in zip(panels, BOTTOMS, strict=True):
        lines = []
        for layer in LAYERS:
            colour = COLOURS[layer]
            curves = np.stack([run.curve for run in select(runs, layer, bottom)])
            lines += axes.plot(np.median(curves, axis=0), color=colour, label=layer)
            axes.fill_between(range(curves.shape[1]), curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_title(f"bottom layer {bottom}", fontsize=10)
    panels[0].set_ylabel("training loss")
    for place, bottom in enumerate(BOTTOMS):
        for row, layer in enumerate(LAYERS):
            values, height = [run.cka for run in select(runs, layer, bottom)], row + 0.3 * place - 0.15
            look = {"color": COLOURS[layer], "mfc": "white" if place else COLOURS[layer], "alpha": 0.8}
            alike.plot(values, [height] * len(values), "os"[place], ms=5, **look)
    alike.set_yticks(range(len(LAYERS)), ["dense, another seed" if name == "dense" else name for name in LAYERS])
    alike.invert_yaxis()
    alike.set_xlabel("CKA")
    alike.set_title("hidden layer beside dense\n(full: frozen, open: trained)", fontsize=10)
    for axes in (*panels, alike):
        tidy(axes)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(LAYERS), frameon=False)
    figure.savefig(path, dpi=150)


def draw_regions(runs: Sequence[Run], points: Points, path: Path) -> None:
    """Draw the regions that networks of the first seed assign to the spokes, and the training points."""
    side = np.linspace(-2.4, 2.4, 300, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    figure, colours = new_figure(11, 4.9), ListedColormap(list(COLOURS.values()))
    panels = figure.subplots(len(BOTTOMS), len(LAYERS))
    for row, bottom in zip(panels, BOTTOMS, strict=True):
        for axes, layer in zip(row, LAYERS, strict=True):
            run = select(runs, layer, bottom)[0]
            regions = np.asarray(jax.jit(forward)(run.network, grid)[1]).argmax(axis=-1).reshape(side.size, side.size)
            extent = (side[0], side[-1], side[0], side[-1])
            axes.imshow(regions, origin="lower", extent=extent, cmap=colours, vmin=0, vmax=SPOKES - 1, alpha=0.35)
            axes.scatter(*points.x.T, s=4, c=points.labels, cmap=colours, vmin=0, vmax=SPOKES - 1, lw=0)
            axes.set_title(f"{layer}: {100 * run.test_accuracy:.1f} %", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"bottom {bottom}")
    figure.suptitle(f"Regions of seed {SEEDS[0]}, training points, test accuracy", fontsize=10)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search and train, write and draw the results, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    data = Data(train=pinwheel(draws, 100), held_out=pinwheel(draws, 200), test=pinwheel(draws, 200))
    trials, runs = measure_all(data)
    write_csv(folder / "pinwheel.csv", RUN_COLUMNS, ([getattr(run, name) for name in RUN_COLUMNS] for run in runs))
    write_csv(folder / "pinwheel.search.csv", Trial._fields, trials)
    draw_curves(runs, folder / "pinwheel.png")
    draw_regions(runs, data.train, folder / "pinwheel_regions.png")
    print("\n\n".join(tables(folder).values()))


if __name__ == "__main__":
    command(main)
