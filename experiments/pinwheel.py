"""Which structured matrix can stand for the hidden layer of a small network? A table, loss curves, decision regions.

    python -m experiments.pinwheel

After Figures 4 and 9 of arXiv 2406.17740: points of the plane on a pinwheel of 5 spokes, one class each, and a network
with a hidden layer of 64 x 64 numbers, which is replaced by a matrix of 128: LoRA of rank 1, a pair of circulants, a
pair of symmetric Toeplitz matrices, or one Toeplitz matrix (127). The bottom layer is frozen, or everything is trained;
2,000 epochs, five seeds. The paper reports that the loss of LoRA stays several times higher, and that the structured
matrices reach the dense layer. How many times larger hangs on the learning rate: see the tables.

What the paper leaves open is done like this. The network is `tanh(tanh(x B + b) M + m) T + t` with `M` the matrix
itself, not an update of one; biases are trained, but for a frozen bottom's. `B` is drawn from N(0, 1) and `T` from
N(0, 1/64), the same for all layers; the numbers of `M` are normal, with a deviation at which its entries have a
variance of 1/64, too. Adam on all 500 training points at once; its learning rate falls to 0 by a cosine from the best
of five, by the loss on held-out points after as many epochs, mean of two other seeds. What counts is the last epoch, on
the training points and on new ones.

CKA compares what the hidden layer gives for the new points with the dense network of the same seed, which has the same
bottom and top at the start; and the dense network itself with that of the next seed, where all differs.

Writes `pinwheel.csv`, `.md`, `.png` and `pinwheel_regions.png` to `experiments/results`, or to `--out`.
"""

import argparse
import csv
import functools
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from experiments.cka import linear_cka
from experiments.command import command
from surm_jax import structured
from surm_jax.record.progress import Progress

RESULTS = Path(__file__).parent / "results"
WIDTH, SPOKES = 64, 5
# How a layer is made, and the standard deviation of its numbers at which entries of the matrix have one of about 1/8.
LAYERS = {
    "dense": (structured.Dense.init, WIDTH**-0.5),
    "lora": (functools.partial(structured.LowRank.init, rank=1), WIDTH**-0.25),
    "circulant": (structured.CirculantPair.init, WIDTH**-0.25),
    "symmetric_toeplitz": (structured.SymmetricToeplitzPair.init, WIDTH**-0.5),
    "toeplitz": (structured.Toeplitz.init, WIDTH**-0.5),
}
# What the steps of the bottom layer are multiplied by.
BOTTOMS = {"frozen": 0.0, "trained": 1.0}
EPOCHS = 2000
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEEDS = (10, 11)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COLOURS = dict(zip(LAYERS, ("#4878a8", "#e0883a", "#5f9e5a", "#b8504f", "#8a6bb0"), strict=True))


class Points(NamedTuple):
    """Points of the plane, in float32, and their spokes."""

    x: Float[np.ndarray, "points 2"]
    labels: Int[np.ndarray, " points"]


class Data(NamedTuple):
    """Three draws of the same pinwheel."""

    train: Points
    held_out: Points
    test: Points


class Network(NamedTuple):
    """The parameters of a network, or of a stack of them; `hidden` is the layer that is replaced."""

    bottom: Float[Array, "2 width"]
    bottom_bias: Float[Array, " width"]
    hidden: structured.StructuredMatrix
    hidden_bias: Float[Array, " width"]
    top: Float[Array, "width spokes"]
    top_bias: Float[Array, " spokes"]


class Run(NamedTuple):
    """A trained network, the training loss by epoch, and what its hidden layer gives for the test points."""

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


def pinwheel(draws: np.random.Generator, per_spoke: int) -> Points:
    """Returns points on a pinwheel, `per_spoke` on each spoke.

    As in Johnson et al. (2016), arXiv 1603.06277: normal along a spoke (mean 1, standard deviation 0.3) and across it
    (0.1), and turned by exp(distance) / 4.
    """
    labels = np.repeat(np.arange(SPOKES), per_spoke)
    along, across = draws.normal(size=(2, labels.size)) * [[0.3], [0.1]] + [[1.0], [0.0]]
    angle = 2 * np.pi * labels / SPOKES + np.exp(along) / 4
    x, y = along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)
    return Points(np.stack([x, y], axis=1).astype(np.float32), labels)


def start(layer: str, seed: int) -> Network:
    """Returns a network with random weights; bottom and top depend on the seed alone, not on the layer."""
    draws = np.random.default_rng(seed)

    def normal(deviation: float, *shape: int) -> Float[np.ndarray, "..."]:
        return draws.normal(0, deviation, shape).astype(np.float32)

    bottom, top = normal(1.0, 2, WIDTH), normal(WIDTH**-0.5, WIDTH, SPOKES)
    init, deviation = LAYERS[layer]
    empty = jax.eval_shape(lambda: init(jax.random.key(0), (WIDTH, WIDTH), scale=1.0))
    hidden = jax.tree.map(lambda array: normal(deviation, *array.shape), empty)
    zeros = np.zeros(WIDTH, np.float32)
    return Network(bottom, zeros, hidden, zeros, top, zeros[:SPOKES])


def forward(network: Network, x: Float[Array, "points 2"]) -> tuple[Array, Array]:
    """Returns what the hidden layer gives, (points, width), and the scores of the spokes, (points, spokes)."""
    hidden = jnp.tanh(x @ network.bottom + network.bottom_bias[None])
    # Forming so small a matrix costs less than transforms of the points.
    hidden = jnp.tanh(structured.matmul(hidden, network.hidden, execution="dense") + network.hidden_bias[None])
    return hidden, hidden @ network.top + network.top_bias[None]


def cross_entropy(scores: Float[Array, "points spokes"], points: Points) -> Float[Array, ""]:
    """Returns the loss, a mean over points."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, points.labels).mean()


@functools.partial(jax.jit, static_argnames="epochs")
def train(
    networks: Network,
    rates: Float[Array, " networks"],
    bottoms: Float[Array, " networks"],
    points: Points,
    *,
    epochs: int,
) -> tuple[Network, Float[Array, "networks epochs"]]:
    """Trains a stack of networks side by side: one program for all seeds, rates and both kinds of bottom.

    Each has its own first learning rate, and its own number by which the steps of its bottom layer are multiplied.
    Returns the trained networks, and the loss of each before every step.
    """
    adam, share = optax.scale_by_adam(), optax.cosine_decay_schedule(1.0, epochs)

    def loss(network):
        return cross_entropy(forward(network, points.x)[1], points)

    def step(carry, epoch, rate, bottom):
        network, state = carry
        value, gradient = jax.value_and_grad(loss)(network)
        moves, state = adam.update(gradient, state)
        moves = moves._replace(bottom=bottom * moves.bottom, bottom_bias=bottom * moves.bottom_bias)
        rate *= share(epoch)
        return (jax.tree.map(lambda value, move: value - rate * move, network, moves), state), value

    def train_one(network, rate, bottom):
        steps = functools.partial(step, rate=rate, bottom=bottom)
        (network, _), losses = jax.lax.scan(steps, (network, adam.init(network)), jnp.arange(epochs))
        return network, losses

    return jax.vmap(train_one)(networks, rates, bottoms)


def starts(layer: str, seeds: Iterable[int]) -> Network:
    """Returns a stack of starts, one for each seed."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(start(layer, seed) for seed in seeds))


@jax.jit
def evaluate(networks: Network, points: Points) -> tuple[Array, Array, Array]:
    """Returns the loss and the accuracy of each network of a stack, and what its hidden layer gives."""

    def evaluate_one(network):
        hidden, scores = forward(network, points.x)
        return cross_entropy(scores, points), (scores.argmax(axis=-1) == points.labels).mean(), hidden

    return jax.vmap(evaluate_one)(networks)


def search(layer: str, bottom: str, data: Data) -> list[Trial]:
    """Tries all learning rates for a layer."""
    rates, seeds = zip(*itertools.product(RATES, SEARCH_SEEDS), strict=True)
    multiples = np.full(len(seeds), BOTTOMS[bottom], np.float32)
    networks, _ = train(starts(layer, seeds), np.float32(rates), multiples, data.train, epochs=EPOCHS)
    losses = [np.asarray(evaluate(networks, points)[0], float) for points in (data.train, data.held_out)]
    means = [of_points.reshape(len(RATES), -1).mean(axis=1).tolist() for of_points in losses]
    return [Trial(layer, bottom, *values) for values in zip(RATES, *means, strict=True)]


def select(rows: Iterable[Trial | Run], layer: str, bottom: str) -> list[Trial | Run]:
    """Returns the trials or the runs of a cell, in their order."""
    return [row for row in rows if (row.layer, row.bottom) == (layer, bottom)]


def best_rate(trials: Iterable[Trial], layer: str, bottom: str) -> float:
    """Returns the learning rate with the smallest loss on held-out points."""
    return min(select(trials, layer, bottom), key=lambda trial: trial.held_out_loss).learning_rate


def measure(layer: str, rate_of: dict[str, float], data: Data, dense: Sequence[Run]) -> list[Run]:
    """Trains a layer with every seed and both kinds of bottom, each of which has its learning rate.

    `dense` are the runs of the dense layer in the same order, or none while it is measured itself.
    """
    cases = list(itertools.product(BOTTOMS, SEEDS))
    rates = [rate_of[bottom] for bottom, _ in cases]
    multiples = np.float32([BOTTOMS[bottom] for bottom, _ in cases])
    begun = starts(layer, [seed for _, seed in cases])
    networks, curves = jax.device_get(train(begun, np.float32(rates), multiples, data.train, epochs=EPOCHS))
    train_loss, _, _ = jax.device_get(evaluate(networks, data.train))
    test_loss, accuracy, hidden = jax.device_get(evaluate(networks, data.test))
    # The dense network of the same seed, or the one of the next.
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
    """Searches and measures every layer, and shows how far it is."""
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


def table(runs: Sequence[Run], bottom: str) -> str:
    """Returns the table of a kind of bottom in markdown: means over seeds."""
    columns = "numbers | rate | training loss | of dense | test loss | of dense | test accuracy | CKA"
    lines = [f"| layer | {columns} |", "|---|" + "---:|" * 8]
    for layer in LAYERS:
        mine, dense = select(runs, layer, bottom), select(runs, "dense", bottom)
        cells = [f"{mine[0].numbers:,}", f"{mine[0].learning_rate:g}"]
        for name in ("train_loss", "test_loss"):
            mean, of_dense = (statistics.mean(getattr(run, name) for run in group) for group in (mine, dense))
            cells += [f"{mean:.2g}", f"{mean / of_dense:.1f} x"]
        for factor, name, digits, unit in ((100, "test_accuracy", 1, " %"), (1, "cka", 2, "")):
            values = [factor * getattr(run, name) for run in mine]
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}{unit}")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def search_table(trials: Sequence[Trial], bottom: str) -> str:
    """Returns the losses of all learning rates in markdown, training and held-out; what was chosen is bold."""
    lines = ["| layer | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---|" + "---:|" * len(RATES)]
    for layer in LAYERS:
        best = best_rate(trials, layer, bottom)
        cells = {t.learning_rate: f"{t.train_loss:.2g} / {t.held_out_loss:.2g}" for t in select(trials, layer, bottom)}
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {layer} | " + " | ".join(cells.values()) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draws the training loss by epoch, median and range over seeds, and the CKA of every seed."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
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
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(LAYERS), frameon=False)
    figure.savefig(path, dpi=150)


def draw_regions(runs: Sequence[Run], points: Points, path: Path) -> None:
    """Draws the regions that the networks of the first seed give to the spokes, and the training points."""
    side = np.linspace(-2.4, 2.4, 300, dtype=np.float32)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    figure, colours = Figure(figsize=(11, 4.9), layout="constrained"), ListedColormap(list(COLOURS.values()))
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


def report(trials: Sequence[Trial], runs: Sequence[Run], data: Data, folder: Path) -> str:
    """Writes the runs, the tables and the pictures into a folder, and returns the text with the tables."""
    columns = Run._fields[: Run._fields.index("curve")]
    with (folder / "pinwheel.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        for run in runs:
            values = [getattr(run, name) for name in columns]
            rows.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    title = f"""# Pinwheel

`python -m experiments.pinwheel`: {len(SEEDS)} seeds, {EPOCHS:,} epochs. The hidden layer of 64 x 64 is dense, or a
matrix of few numbers. Means over seeds, for accuracy and CKA ± standard deviation; every run is in `pinwheel.csv`. CKA
is with the dense layer of the same seed, and that of the dense layer with another seed. The script says how it is done.
"""
    parts = [title]
    for bottom in BOTTOMS:
        parts += [f"## Bottom layer {bottom}\n", table(runs, bottom)]
        parts += ["Training and held-out loss of the search, by learning rate; bold is what was chosen:\n"]
        parts += [search_table(trials, bottom)]
    parts += ["![training loss and CKA](pinwheel.png)\n", "![decision regions](pinwheel_regions.png)\n"]
    (folder / "pinwheel.md").write_text(text := "\n".join(parts))
    draw_curves(runs, folder / "pinwheel.png")
    draw_regions(runs, data.train, folder / "pinwheel_regions.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Searches, measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    data = Data(train=pinwheel(draws, 100), held_out=pinwheel(draws, 200), test=pinwheel(draws, 200))
    trials, runs = measure_all(data)
    print(report(trials, runs, data, options.out))


if __name__ == "__main__":
    command(main)
