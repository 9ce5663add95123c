"""Measure which structured matrices can replace the kernel of the hidden layer in a small network.

    python -m experiments.pinwheel

This experiment follows Figures 4 and 9 of arXiv 2406.17740. Points of the plane form a pinwheel with 5 spokes, and each
spoke is a class. A small network classifies them. Its hidden layer has a dense 64 x 64 kernel, which is compared with
four kernels of about 128 parameters: a matrix of rank 1 (LoRA), the product of two circulants, the product of two
symmetric Toeplitz matrices, and one Toeplitz matrix (127 parameters). The bottom layer is frozen in one half of the
runs; in the other half everything is trained. Every network is trained for 2,000 epochs, with five seeds. The paper
reports that the loss of LoRA stays several times higher, and that the structured matrices reach the dense kernel.

The paper leaves some choices open. This experiment makes them as follows:

- The network is `tanh(tanh(x B + b) M + m) T + t`, where `B`, `M` and `T` are the kernels of the bottom, the hidden and
  the top layer. `M` is the structured matrix itself, not an update that is added to a dense kernel. All biases are
  trained, except for that of a frozen bottom layer.
- The initial `B` is drawn from N(0, 1) and `T` from N(0, 1/64). For a given seed, they are the same for all kinds of
  `M`. The parameters of `M` are Gaussian, with the standard deviation that gives the entries of `M` a variance of 1/64.
- The optimiser is Adam, and every step uses all 500 training points. The learning rate decays to 0 on a cosine
  schedule. Its initial value is the best of five, judged by the final loss on held-out points, averaged over two other
  seeds.
- Losses and accuracies are measured after the last epoch, on the training points and on new test points.
- CKA compares the hidden layer's outputs on the test points with those of the dense network of the same seed, which
  started with the same `B` and `T`. The dense network itself is compared with the dense network of the next seed.

The experiment writes `pinwheel.csv`, `pinwheel.search.csv`, `pinwheel.png` and `pinwheel_regions.png` to
`experiments/results`, or to the folder given by `--out`, and prints the tables.
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

# For each kind of bottom layer, the factor that multiplies the optimiser's steps of its parameters.
BOTTOMS = {"frozen": 0.0, "trained": 1.0}
EPOCHS = 2000
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEEDS = (10, 11)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COLOURS = dict(zip(LAYERS, ("#4878a8", "#e0883a", "#5f9e5a", "#b8504f", "#8a6bb0"), strict=True))


class Data(NamedTuple):
    """Three sets of random points on the pinwheel.

    Attributes:
        train: The points that networks are trained on.
        held_out: The points that learning rates are chosen by.
        test: The points that the final networks are evaluated on.
    """

    train: Points
    held_out: Points
    test: Points


class Run(NamedTuple):
    """A trained network with its measurements.

    Attributes:
        layer: The kind of hidden kernel, a key of `LAYERS`.
        bottom: Whether the bottom layer was "frozen" or "trained".
        seed: The seed of the initial parameters.
        learning_rate: The initial learning rate.
        numbers: The number of parameters of the hidden kernel.
        train_loss: The final loss on the training points.
        test_loss: The final loss on the test points.
        test_accuracy: The final accuracy on the test points, from 0 to 1.
        cka: The linear CKA of the hidden layer's outputs with those of a dense network, which the docstring of this
            module specifies.
        curve: The training loss before every step.
        hidden: The outputs of the hidden layer for the test points.
        network: The trained parameters.
    """

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
    """The result of one learning rate in the search for the best one.

    Attributes:
        layer: The kind of hidden kernel, a key of `LAYERS`.
        bottom: Whether the bottom layer was "frozen" or "trained".
        learning_rate: The initial learning rate.
        train_loss: The final loss on the training points, averaged over `SEARCH_SEEDS`.
        held_out_loss: The final loss on the held-out points, averaged over `SEARCH_SEEDS`.
    """

    layer: str
    bottom: str
    learning_rate: float
    train_loss: float
    held_out_loss: float


def search(layer: str, bottom: str, data: Data) -> list[Trial]:
    """Train networks with all learning rates of `RATES`, for one kind of hidden kernel and one kind of bottom layer."""
    rates, seeds = zip(*itertools.product(RATES, SEARCH_SEEDS), strict=True)
    multiples = np.full(len(seeds), BOTTOMS[bottom], np.float32)
    networks, _ = train(starts(layer, seeds), np.float32(rates), multiples, data.train, epochs=EPOCHS)
    losses = [np.asarray(evaluate(networks, points)[0], float) for points in (data.train, data.held_out)]
    means = [of_points.reshape(len(RATES), -1).mean(axis=1).tolist() for of_points in losses]
    return [Trial(layer, bottom, *values) for values in zip(RATES, *means, strict=True)]


def select(rows: Iterable[Trial | Run], layer: str, bottom: str) -> list[Trial | Run]:
    """Return the trials or runs with this kind of hidden kernel and this kind of bottom layer."""
    return [row for row in rows if (row.layer, row.bottom) == (layer, bottom)]


def best_rate(trials: Iterable[Trial], layer: str, bottom: str) -> float:
    """Return the learning rate with the smallest held-out loss for one kind of hidden kernel and of bottom layer."""
    return min(select(trials, layer, bottom), key=lambda trial: trial.held_out_loss).learning_rate


def measure(layer: str, rate_of: dict[str, float], data: Data, dense: Sequence[Run]) -> list[Run]:
    """Train and evaluate networks with one kind of hidden kernel, for every seed and both kinds of bottom layer.

    Args:
        layer: The kind of hidden kernel, a key of `LAYERS`.
        rate_of: The initial learning rate for each kind of bottom layer.
        data: The points.
        dense: The runs with the dense kernel that CKA compares with, in the order in which this function returned them.
            Empty if `layer` is itself the dense kernel.
    """
    cases = list(itertools.product(BOTTOMS, SEEDS))
    rates = [rate_of[bottom] for bottom, _ in cases]
    multiples = np.float32([BOTTOMS[bottom] for bottom, _ in cases])
    begun = starts(layer, [seed for _, seed in cases])
    networks, curves = jax.device_get(train(begun, np.float32(rates), multiples, data.train, epochs=EPOCHS))
    train_loss, _, _ = jax.device_get(evaluate(networks, data.train))
    test_loss, accuracy, hidden = jax.device_get(evaluate(networks, data.test))
    # CKA compares a network with the dense network of the same seed, and a dense network with that of the next seed.
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
    """For every kind of hidden kernel, search the learning rates and do the final runs, with a progress bar."""
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
    """Return two markdown tables for each kind of bottom layer: the results and the search for learning rates.

    Args:
        folder: The folder of `pinwheel.csv` and `pinwheel.search.csv`.
    """
    runs, trials = read_csv(folder / "pinwheel.csv"), read_csv(folder / "pinwheel.search.csv")
    found = {}
    for bottom in dict.fromkeys(row["bottom"] for row in runs):
        found[bottom] = run_table([row for row in runs if row["bottom"] == bottom])
        found[f"search, {bottom}"] = search_table([row for row in trials if row["bottom"] == bottom])
    return found


def run_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the table of results, with a line for each kind of hidden kernel.

    Values are means over seeds. Losses are also given as multiples of the loss with the dense kernel.
    """
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
    """Return the table of training and held-out losses at all learning rates, with the chosen rate in bold."""
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
    """Draw a picture of three panels.

    Two panels show the training loss by epoch (median and range over seeds), one for each kind of bottom layer. The
    third shows the CKA of every run.
    """
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
    """Draw the decision regions of all networks with the first seed, and the training points.

    A decision region is the part of the plane that a network assigns to one spoke.
    """
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
    """Run the experiment, write and draw its results, and print the tables."""
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
