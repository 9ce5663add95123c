"""How near structured matrices come to dense ones: five kinds of targets, six families, equal budgets.

    python -m experiments.approximation

The approximation study of arXiv 2406.17740 (Figure 5), with low rank and Kronecker products beside its families at the
same numbers of parameters. Every family is fitted by gradient descent, as there, and as well as we can: in closed form
(circulant, Toeplitz, symmetric Toeplitz, low rank, Kronecker), or, for `W(G, H)`, which has none, by L-BFGS from two
starts. A lower bound says how much could be missing there.

Writes `experiments/results/approximation.csv` (final errors of every trial), `approximation.curves.csv` (training
curves, mean and standard deviation over trials), `approximation.md` and `.png`, in three and a half minutes on two
cores.
"""

import argparse
import csv
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.command import command
from experiments.descent import MOMENTUM, descend, relative_errors
from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, StructuredMatrix, refine

RESULTS = Path(__file__).parent / "results"
SIDE = 100
SIZES = (1, 2, 4, 8, 16, 20)
NOISE = 0.05
# With which W(G, H) of rank 4, the largest that the paper finds best, can hold them but for the noise.
LOW_RANK = 2
LEARNING_RATE = 0.2
# Of the matrix that descent starts from, relative to the target's.
START_NORM = 0.1
SEARCH_STEPS = 200


def _gaussian(rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    return rng.normal(size=(SIDE, SIDE))


def _near_low_rank(rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    G, H = rng.normal(size=(2, SIDE, LOW_RANK))
    return G @ H.T + NOISE * rng.normal(size=(SIDE, SIDE))


def _sine(rng: np.random.Generator, end: float) -> Float[np.ndarray, "n n"]:
    t = np.sort(rng.uniform(0, end, SIDE))
    return np.sin(np.outer(t, np.arange(1, SIDE + 1)))


TARGETS: dict[str, Callable[[np.random.Generator], Float[np.ndarray, "n n"]]] = {
    "gaussian": _gaussian,
    "near low rank": _near_low_rank,
    "sine": lambda rng: _sine(rng, 2 * np.pi),
    "sine with noise": lambda rng: _sine(rng, 2 * np.pi) + NOISE * rng.normal(size=(SIDE, SIDE)),
    "slow sine": lambda rng: _sine(rng, 1.0),
}


class Kind(NamedTuple):
    """A family at one size: the name and value of the option that sets it, None where there is one size only."""

    family: str
    option: str | None = None
    size: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What `init` and `nearest` of the family are given."""
        return {} if self.option is None else {self.option: self.size}

    @property
    def title(self) -> str:
        """The name in tables and pictures."""
        return TITLES[self.family] + ("" if self.option is None else f", {self.option} {self.size}")

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return jax.eval_shape(lambda: _zero(self)).num_params


TITLES = {
    "Circulant": "circulant",
    "SymmetricToeplitz": "symmetric Toeplitz",
    "Toeplitz": "Toeplitz",
    "LowDisplacementRank": "W(G, H)",
    "LowRank": "low rank",
    "Kronecker": "Kronecker",
}
SIZED = {"LowDisplacementRank": "rank", "LowRank": "rank", "Kronecker": "terms"}


def kinds() -> list[Kind]:
    """Returns all families at all sizes, in the order of their parameters."""
    fixed = [Kind(family) for family in TITLES if family not in SIZED]
    return fixed + [Kind(family, option, size) for size in SIZES for family, option in SIZED.items()]


class Result(NamedTuple):
    """What is known of a family at one size, by target: errors (trials,), and training curves (trials, steps + 1).

    The bound is on the error of every matrix of the family; None where `nearest` is the optimum.
    """

    descent: dict[str, Float[np.ndarray, " trials"]]
    nearest: dict[str, Float[np.ndarray, " trials"]]
    bound: dict[str, Float[np.ndarray, " trials"]] | None
    curves: dict[str, Float[np.ndarray, "trials steps+1"]]


def draw_targets(trials: int) -> Float[np.ndarray, "targets*trials n n"]:
    """Returns the targets in float32: all trials of the first kind, then of the next."""
    rngs = [np.random.default_rng([kind, trial]) for kind in range(len(TARGETS)) for trial in range(trials)]
    makers = [make for make in TARGETS.values() for _ in range(trials)]
    return np.stack([make(rng) for make, rng in zip(makers, rngs, strict=True)]).astype(np.float32)


def fit(kind: Kind, targets: Float[np.ndarray, "targets*trials n n"], steps: int) -> Result:
    """Fits one family at one size to every target, by descent and by `nearest`."""
    starts = _starts(kind, targets)
    last, curves = descend(_dense, starts, targets, steps=steps, learning_rate=LEARNING_RATE)
    if kind.family == "LowDisplacementRank":
        nearest, bound = _search(kind, targets, last), displacement_bound(targets, kind.size)
    else:
        nearest, bound = relative_errors(_nearest(kind, targets), targets), None

    def by_target(values: Array) -> dict[str, np.ndarray]:
        return dict(zip(TARGETS, np.split(np.asarray(values), len(TARGETS)), strict=True))

    return Result(
        descent=by_target(curves[:, -1]),
        nearest=by_target(nearest),
        bound=None if bound is None else by_target(bound),
        curves=by_target(curves),
    )


def displacement_bound(targets: Float[np.ndarray, "trials n n"], rank: int) -> Float[np.ndarray, " trials"]:
    """Returns a relative error that no `W(G, H)` of this rank can go below.

    `L(W) = Z_1 W - W Z_{-1}` has rank r at most for a `W(G, H)`, and `||L(E)||_F <= 2 ||E||_F` since both shifts are
    orthogonal. So `||M - W||_F >= ||L(M) - L(W)||_F / 2`, which is at least half of what the singular values of `L(M)`
    beyond the first r hold (Eckart and Young).
    """
    M = targets.swapaxes(1, 2)  # The paper's orientation.
    shifted = np.concatenate([M[:, :, 1:], -M[:, :, :1]], axis=2)
    values = np.linalg.svd(np.roll(M, 1, axis=1) - shifted, compute_uv=False)
    return np.linalg.norm(values[:, rank:], axis=1) / (2 * np.linalg.norm(M, axis=(1, 2)))


def _dense(matrix: StructuredMatrix) -> Float[Array, "n n"]:
    return matrix.to_dense()


def _zero(kind: Kind) -> StructuredMatrix:
    return FAMILIES[kind.family].init(jax.random.key(0), (SIDE, SIDE), scale=1.0, **kind.options)


def _starts(kind: Kind, targets: Float[np.ndarray, "trials n n"]) -> StructuredMatrix:
    """Random matrices, a tenth as large as their targets; of products, all factors are equally large."""
    zero, trials = _zero(kind), len(targets)
    keys = jax.random.split(jax.random.key(1), len(zero.arrays()))
    leaves = {
        name: jax.random.normal(key, (trials, *leaf.shape))
        for key, (name, leaf) in zip(keys, zero.arrays().items(), strict=True)
    }
    dense = jax.jit(jax.vmap(lambda leaves: zero.with_arrays(**leaves).to_dense()))(leaves)
    norms = jnp.linalg.norm(dense, axis=(1, 2))
    # Every family is homogeneous: linear in each of its leaves.
    scale = (START_NORM * np.linalg.norm(targets, axis=(1, 2)) / norms) ** (1 / len(leaves))
    return jax.vmap(lambda scale, leaves: zero.with_arrays(**{k: scale * leaf for k, leaf in leaves.items()}))(
        scale, leaves
    )


def _nearest(kind: Kind, targets: Float[np.ndarray, "trials n n"], **options: int) -> Float[Array, "trials n n"]:
    nearest = functools.partial(FAMILIES[kind.family].nearest, **kind.options, **options)
    return jax.vmap(lambda M: nearest(M).to_dense())(targets)


def _search(
    kind: Kind, targets: Float[np.ndarray, "trials n n"], descended: StructuredMatrix
) -> Float[Array, " trials"]:
    """The least errors that L-BFGS finds, from where descent ended and from the displacement's truncated SVD."""
    nearest = functools.partial(FAMILIES[kind.family].nearest, **kind.options, steps=0)
    starts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), descended, jax.jit(jax.vmap(nearest))(targets))
    twice = jnp.concatenate([targets, targets])
    found = jax.vmap(lambda start, M: refine(start, M, steps=SEARCH_STEPS).to_dense())(starts, twice)
    return relative_errors(found, twice).reshape(2, -1).min(axis=0)


def fit_all(trials: int, steps: int) -> dict[Kind, Result]:
    """Fits every family at every size; a bar shows the progress."""
    targets = draw_targets(trials)
    results = {}
    with tqdm.tqdm(kinds(), desc=f"{len(targets)} targets", unit="fit") as bar:
        for kind in bar:
            bar.set_postfix_str(kind.title)
            results[kind] = fit(kind, targets, steps)
    return results


def write_csv(results: dict[Kind, Result]) -> None:
    """Writes the final errors of every trial, and the mean training curves at about 25 steps."""
    with (RESULTS / "approximation.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["target", "family", "size", "parameters", "trial", "descent", "nearest", "bound"])
        for kind, result in results.items():
            for target in TARGETS:
                for trial, errors in enumerate(zip(result.descent[target], result.nearest[target], strict=True)):
                    bound = "" if result.bound is None else f"{result.bound[target][trial]:.5f}"
                    known = [f"{error:.5f}" for error in errors]
                    rows.writerow([target, kind.family, kind.size, kind.parameters, trial, *known, bound])
    with (RESULTS / "approximation.curves.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["target", "family", "size", "step", "mean", "std"])
        for kind, result in results.items():
            for target, curves in result.curves.items():
                for step in np.unique(np.geomspace(1, curves.shape[1], 25).astype(int)) - 1:
                    errors = curves[:, step]
                    rows.writerow([target, kind.family, kind.size, step, *(f"{v:.5f}" for v in _summary(errors))])


def _summary(errors: Sequence[float]) -> tuple[float, float]:
    values = [float(error) for error in errors]
    return statistics.mean(values), statistics.stdev(values)


def table(results: dict[Kind, Result], column: str) -> str:
    """Returns the errors in markdown, families of one budget together, the nearest of them in bold.

    Args:
        results: Everything.
        column: "nearest" or "descent".
    """
    lines = ["| family | parameters | " + " | ".join(TARGETS) + " |", "|---|" + "---:|" * (1 + len(TARGETS))]
    means = {
        kind: {target: _summary(errors)[0] for target, errors in getattr(result, column).items()}
        for kind, result in results.items()
    }
    for kind, result in results.items():
        rivals = [other for other in results if _budget(other) == _budget(kind)]
        cells = []
        for target in TARGETS:
            mean, deviation = _summary(getattr(result, column)[target])
            # Four digits tell the families apart; a tie within them is no victory.
            best = round(mean, 4) <= round(min(means[other][target] for other in rivals), 4)
            cells.append(f"**{mean:.4f}** ± {deviation:.4f}" if best else f"{mean:.4f} ± {deviation:.4f}")
        lines.append(f"| {kind.title} | {kind.parameters:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _budget(kind: Kind) -> int:
    """The number of parameters, to the next multiple of the side: a Toeplitz matrix lacks one."""
    return -(-kind.parameters // SIDE)


def bound_table(results: dict[Kind, Result]) -> str:
    """Returns what the error of every `W(G, H)` is at least, in markdown."""
    lines = ["| family | " + " | ".join(TARGETS) + " |", "|---|" + "---:|" * len(TARGETS)]
    for kind, result in results.items():
        if result.bound is not None:
            means = [_summary(result.bound[target])[0] for target in TARGETS]
            lines.append(f"| {kind.title} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


COLOURS = {
    "LowDisplacementRank": "#1f77b4",
    "LowRank": "#d62728",
    "Kronecker": "#ff7f0e",
    "Toeplitz": "#2ca02c",
    "SymmetricToeplitz": "#9467bd",
    "Circulant": "#111111",
}


def draw(results: dict[Kind, Result]) -> None:
    """Draws the training curves of the paper's families, and below them all families at equal budget."""
    figure = Figure(figsize=(3.1 * len(TARGETS), 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(TARGETS))
    for target, above, below in zip(TARGETS, *panels, strict=True):
        _draw_curves(above, results, target)
        _draw_budgets(below, results, target)
        above.set_title(target, fontsize=11)
        above.set_xlabel("steps of gradient descent")
        below.set_xlabel("parameters")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for row in panels:
        row[0].set_ylabel("relative Frobenius error")
        row[-1].legend(*row[0].get_legend_handles_labels(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(RESULTS / "approximation.png", dpi=130)


def _draw_curves(axes: Axes, results: dict[Kind, Result], target: str) -> None:
    blues = iter(colormaps["Blues"](np.linspace(0.35, 1, len(SIZES))))
    for kind, result in results.items():
        if kind.family in ("LowRank", "Kronecker"):
            continue
        curves = result.curves[target]
        steps, mean, deviation = np.arange(curves.shape[1]), curves.mean(axis=0), curves.std(axis=0, ddof=1)
        if kind.option:
            style = {"color": next(blues)}
        else:
            style = {"color": COLOURS[kind.family], "ls": "--"}
        axes.plot(steps + 1, mean, lw=1.5, label=kind.title, **style)
        axes.fill_between(steps + 1, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, lw=0)
    axes.set_xscale("log")


def _draw_budgets(axes: Axes, results: dict[Kind, Result], target: str) -> None:
    for family, title in TITLES.items():
        mine = [kind for kind in results if kind.family == family]
        budgets = [kind.parameters for kind in mine]
        means, deviations = zip(*(_summary(results[kind].nearest[target]) for kind in mine), strict=True)
        axes.errorbar(budgets, means, deviations, color=COLOURS[family], label=title, marker="o", ms=4, lw=1.5)
        descended = [_summary(results[kind].descent[target])[0] for kind in mine]
        axes.plot(budgets, descended, "o", ms=8, mfc="none", color=COLOURS[family])
    axes.plot([], [], "o", ms=8, mfc="none", color="grey", label="by gradient descent")
    axes.plot([], [], "o-", ms=4, lw=1.5, color="grey", label="nearest known")
    axes.set_xscale("log")
    axes.set_xticks([SIDE, 4 * SIDE, 40 * SIDE])
    axes.get_xaxis().set_major_formatter("{x:,.0f}")
    axes.minorticks_off()


def report(results: dict[Kind, Result], trials: int, steps: int) -> str:
    """Returns the text of `approximation.md`."""
    return f"""# Approximation of {SIDE} x {SIDE} matrices

`python -m experiments.approximation`: relative Frobenius errors, mean ± standard deviation of {trials} trials. After
arXiv 2406.17740, Figure 5. Bold: the nearest family within a budget, to four digits.

Targets: **gaussian** is i.i.d. N(0, 1); **near low rank** is `G H^T + {NOISE} R`, with normal G and H of {LOW_RANK}
columns and normal R; row i of **sine** is `sin(k t_i)`, k = 1 to {SIDE}, **with noise** plus `{NOISE} R`. The rank and
the times are ours: the t_i are uniform on [0, 2 pi), in increasing order, and on [0, 1) for **slow sine**, which shows
how much hangs on that choice.

## The nearest matrices that are known

The optimum in closed form, but for `W(G, H)`, which has none: the best that {SEARCH_STEPS} steps of L-BFGS found, from
where gradient descent ended and from the truncated SVD of the target's displacement.

{table(results, "nearest")}
No `W(G, H)` at all has an error below this (half of the tail of the target's displacement); the optimum is somewhere
between the two:

{bound_table(results)}
## Gradient descent

{steps:,} steps with momentum {MOMENTUM} and learning rate {LEARNING_RATE} on the squared relative error, from random
factors a tenth as large as the target.

{table(results, "descent")}
![training curves, and errors at equal budget](approximation.png)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=10, help="how many targets of each kind, at least 2")
    parser.add_argument("--steps", type=int, default=2000, help="how many of gradient descent")
    options = parser.parse_args(arguments)
    if options.trials < 2 or options.steps < 1:
        raise UserError(f"--trials must be at least 2 and --steps 1, got {options.trials} and {options.steps}")
    results = fit_all(options.trials, options.steps)
    RESULTS.mkdir(exist_ok=True)
    write_csv(results)
    draw(results)
    (RESULTS / "approximation.md").write_text(report(results, options.trials, options.steps))
    print((RESULTS / "approximation.md").read_text())


if __name__ == "__main__":
    command(main)
