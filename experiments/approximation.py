"""Measure how well six families of structured matrices approximate five kinds of dense target matrices.

    python -m experiments.approximation

This is the approximation study of arXiv 2406.17740 (Figure 5). It adds two families, low-rank matrices and sums of
Kronecker products, at sizes with as many parameters as the paper's `W(G, H)`, the matrices of low displacement rank.
Every family is fitted to every target twice: by gradient descent, as in the paper, and as well as possible. The second
fit is the nearest matrix, which has a closed form for every family except `W(G, H)`. For that family it is the better
of two L-BFGS searches, and a lower bound on the error of every `W(G, H)` is computed too.

The experiment writes three files to `experiments/results`: `approximation.csv` has the final errors of every trial,
`approximation.curves.csv` the errors during gradient descent (mean and standard deviation over trials), and
`approximation.png` is a picture of both. It also prints the tables. It takes three and a half minutes on two CPU cores.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float
from matplotlib import colormaps
from matplotlib.axes import Axes

from experiments.command import command
from experiments.descent import descend, relative_errors
from experiments.grid import RESULTS
from experiments.tables import markdown, mean_and_deviation, new_figure, read_csv, tidy, write_csv
from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, StructuredMatrix, refine

SIDE = 100
SIZES = (1, 2, 4, 8, 16, 20)
# The families of the study and their colours in the picture.
COLOURS = {
    "Circulant": "#111111",
    "SymmetricToeplitz": "#9467bd",
    "Toeplitz": "#2ca02c",
    "LowDisplacementRank": "#1f77b4",
    "LowRank": "#d62728",
    "Kronecker": "#ff7f0e",
}
NOISE = 0.05
# The rank of the targets of the kind "near low rank" before noise is added. A `W(G, H)` of rank 4 can represent them
# except for the noise. Rank 4 is the largest rank at which the paper finds `W(G, H)` best.
LOW_RANK = 2
LEARNING_RATE = 0.2
# The Frobenius norm of the matrix that gradient descent starts from, as a multiple of the target's norm.
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
    """A family of structured matrices at one size.

    Attributes:
        family: The name of the family's class, a key of `FAMILIES`.
        size: The value of the family's first option, such as the rank. None if the family has a single size.
    """

    family: str
    size: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments that set the size in the family's `init` and `nearest`."""
        return {} if self.size is None else {FAMILIES[self.family].option_names[0]: self.size}

    @property
    def title(self) -> str:
        """The title of this family and size in tables and pictures."""
        return ", ".join([_abstract(self).title, *(f"{name} {value}" for name, value in self.options.items())])

    @property
    def parameters(self) -> int:
        """The number of parameters of a matrix of this family and size."""
        return _abstract(self).num_params


def kinds() -> list[Kind]:
    """Return all families at all sizes: first the families with a single size, then the others by size."""
    sized = [family for family in COLOURS if FAMILIES[family].option_names]
    fixed = [Kind(family) for family in COLOURS if family not in sized]
    return fixed + [Kind(family, size) for size in SIZES for family in sized]


def draw_targets(trials: int) -> Float[np.ndarray, "targets*trials n n"]:
    """Return all targets in one float32 array, ordered by kind and then by trial."""
    rngs = [np.random.default_rng([kind, trial]) for kind in range(len(TARGETS)) for trial in range(trials)]
    makers = [make for make in TARGETS.values() for _ in range(trials)]
    return np.stack([make(rng) for make, rng in zip(makers, rngs, strict=True)]).astype(np.float32)


class Result(NamedTuple):
    """The relative Frobenius errors of a family at one size, for every target of every kind.

    Attributes:
        descent: The errors after gradient descent, (targets*trials,).
        nearest: The errors of the nearest matrices that `fit` finds, (targets*trials,).
        bound: A lower bound on the error of every matrix of the family, (targets*trials,). None if `nearest` holds the
            smallest possible errors.
        curves: The errors before the first step of gradient descent and after each step, (targets*trials, steps + 1).
    """

    descent: Float[np.ndarray, " targets*trials"]
    nearest: Float[np.ndarray, " targets*trials"]
    bound: Float[np.ndarray, " targets*trials"] | None
    curves: Float[np.ndarray, "targets*trials steps+1"]


def fit(kind: Kind, targets: Float[np.ndarray, "targets*trials n n"], steps: int) -> Result:
    """Fit a family at one size to every target, in both ways that the docstring of this module describes.

    Args:
        kind: The family and its size.
        targets: The targets of all kinds, as in `draw_targets`.
        steps: The number of steps of gradient descent.
    """
    starts = _starts(kind, targets)
    last, curves = descend(_dense, starts, targets, steps=steps, learning_rate=LEARNING_RATE)
    if kind.family == "LowDisplacementRank":
        nearest, bound = _search(kind, targets, last), displacement_bound(targets, kind.size)
    else:
        nearest, bound = relative_errors(_nearest(kind, targets), targets), None
    return Result(np.asarray(curves[:, -1]), np.asarray(nearest), bound, np.asarray(curves))


def displacement_bound(targets: Float[np.ndarray, "trials n n"], rank: int) -> Float[np.ndarray, " trials"]:
    """Return, for each target, a lower bound on the relative error of every `W(G, H)` of this rank.

    Let r be the rank and M the target. The displacement `L(W) = Z_1 W - W Z_{-1}` of a `W(G, H)` has rank at most r.
    The cyclic shift Z_1 and the skew-cyclic shift Z_{-1} are orthogonal, so `||L(E)||_F <= 2 ||E||_F` for every matrix
    E. So `||M - W||_F >= ||L(M) - L(W)||_F / 2`, and by Eckart and Young the right side is at least half the norm of
    all singular values of `L(M)` except the r largest.
    """
    M = targets.swapaxes(1, 2)  # The paper multiplies column vectors, `M x`, but this package computes `x @ M`.
    shifted = np.concatenate([M[:, :, 1:], -M[:, :, :1]], axis=2)
    values = np.linalg.svd(np.roll(M, 1, axis=1) - shifted, compute_uv=False)
    return np.linalg.norm(values[:, rank:], axis=1) / (2 * np.linalg.norm(M, axis=(1, 2)))


def _dense(matrix: StructuredMatrix) -> Float[Array, "n n"]:
    return matrix.to_dense()


def _zero(kind: Kind) -> StructuredMatrix:
    return FAMILIES[kind.family].init(jax.random.key(0), (SIDE, SIDE), scale=1.0, **kind.options)


def _abstract(kind: Kind) -> StructuredMatrix:
    return jax.eval_shape(lambda: _zero(kind))


def _starts(kind: Kind, targets: Float[np.ndarray, "trials n n"]) -> StructuredMatrix:
    """Return the random matrices that gradient descent starts from, scaled to a tenth of the norm of their targets.

    All arrays of parameters of a matrix are scaled by one factor.
    """
    zero, trials = _zero(kind), len(targets)
    keys = jax.random.split(jax.random.key(1), len(zero.arrays()))
    leaves = {
        name: jax.random.normal(key, (trials, *leaf.shape))
        for key, (name, leaf) in zip(keys, zero.arrays().items(), strict=True)
    }
    dense = jax.jit(jax.vmap(lambda leaves: zero.with_arrays(**leaves).to_dense()))(leaves)
    norms = jnp.linalg.norm(dense, axis=(1, 2))
    # Every matrix is linear in each of its k arrays, so scaling all arrays by s scales the matrix by s^k.
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
    """Return, for each target, the smaller of the relative errors that two L-BFGS searches reach.

    One search starts from the result of gradient descent. The other starts from the result of `nearest` with `steps=0`,
    which uses the truncated SVD of the displacement.
    """
    nearest = functools.partial(FAMILIES[kind.family].nearest, **kind.options, steps=0)
    starts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), descended, jax.jit(jax.vmap(nearest))(targets))
    twice = jnp.concatenate([targets, targets])
    found = jax.vmap(lambda start, M: refine(start, M, steps=SEARCH_STEPS).to_dense())(starts, twice)
    return relative_errors(found, twice).reshape(2, -1).min(axis=0)


def run(trials: int, steps: int) -> tuple[list[tuple], list[tuple]]:
    """Fit every family at every size to all targets, and show a progress bar.

    Args:
        trials: The number of targets of each kind.
        steps: The number of steps of gradient descent.

    Returns:
        The rows of two csv files. The first has the final errors. The second has the mean error during gradient
        descent and its standard deviation, at about 25 of the steps.
    """
    targets, errors, curves = draw_targets(trials), [], []
    with tqdm.tqdm(kinds(), desc=f"{len(targets)} targets", unit="fit") as bar:
        for kind in bar:
            bar.set_postfix_str(kind.title)
            result = fit(kind, targets, steps)
            for place, target in enumerate(TARGETS):
                mine = slice(place * trials, (place + 1) * trials)
                columns = [result.descent, result.nearest, *([] if result.bound is None else [result.bound])]
                for trial, values in enumerate(zip(*(column[mine] for column in columns), strict=True)):
                    texts = [f"{value:.5f}" for value in values] + [""] * (3 - len(values))
                    errors.append((target, kind.family, kind.size, kind.parameters, trial, *texts))
                for step in np.unique(np.geomspace(1, steps + 1, 25).astype(int)) - 1:
                    found = [float(value) for value in result.curves[mine, step]]
                    texts = [f"{statistics.mean(found):.5f}", f"{statistics.stdev(found):.5f}"]
                    curves.append((target, kind.family, kind.size, step, *texts))
    return errors, curves


ERROR_COLUMNS = ("target", "family", "size", "parameters", "trial", "descent", "nearest", "bound")
CURVE_COLUMNS = ("target", "family", "size", "step", "mean", "std")
Errors = Mapping[str, Mapping[Kind, list[float]]]


def read_errors(folder: Path, column: str) -> Errors:
    """Return the errors in a column of `approximation.csv`, by the kind of target and then by family and size.

    Args:
        folder: The folder of the csv file.
        column: "descent", "nearest" or "bound". Rows in which it is empty are left out.
    """
    errors: dict[str, dict[Kind, list[float]]] = {}
    for row in read_csv(folder / "approximation.csv"):
        if row[column]:
            errors.setdefault(row["target"], {}).setdefault(_kind(row), []).append(float(row[column]))
    return errors


def _kind(row: Mapping[str, str]) -> Kind:
    return Kind(row["family"], int(row["size"]) if row["size"] else None)


def error_table(errors: Errors) -> str:
    """Return a markdown table of errors with a line for each family and size.

    For each kind of target, the smallest mean error is in bold, among families with about as many parameters.
    """
    means = {target: {kind: statistics.mean(one) for kind, one in of.items()} for target, of in errors.items()}
    counts, lines = {kind: kind.parameters for kind in next(iter(errors.values()))}, []
    # Families compete if their numbers of parameters, divided by the side and rounded up, agree. Rounding is needed
    # because a Toeplitz matrix has 2 * SIDE - 1 parameters.
    budgets = {kind: -(-count // SIDE) for kind, count in counts.items()}
    for kind, count in counts.items():
        line = {"family": kind.title, "parameters": count}
        for target, of in errors.items():
            rivals = [mean for other, mean in means[target].items() if budgets[other] == budgets[kind]]
            line[target] = mean_and_deviation(of[kind], digits=4)
            # Errors that agree to four decimal places count as equal, and all of them are in bold.
            if round(means[target][kind], 4) <= round(min(rivals), 4):
                line[target] = "**{}** ± {}".format(*line[target].split(" ± "))
        lines.append(line)
    return markdown(lines, {"family": "", "parameters": ","} | dict.fromkeys(errors, ">"))


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return the tables "nearest", "descent" and "bound" in markdown.

    They show the errors of the nearest matrices that `fit` finds, the errors after gradient descent, and the lower
    bounds on the errors of `W(G, H)`.
    """
    bounds = read_errors(folder, "bound")
    lines = [
        {"family": kind.title} | {target: statistics.mean(of[kind]) for target, of in bounds.items()}
        for kind in next(iter(bounds.values()))
    ]
    return {name: error_table(read_errors(folder, name)) for name in ("nearest", "descent")} | {
        "bound": markdown(lines, {"family": ""} | dict.fromkeys(bounds, ".4f"))
    }


def draw(folder: Path) -> None:
    """Draw `approximation.png` from the csv files of a folder, with a column of two panels for each kind of target.

    The upper panel shows the errors of the paper's families during gradient descent. The lower panel shows the final
    errors of all families against the number of parameters.
    """
    nearest, descent = (read_errors(folder, column) for column in ("nearest", "descent"))
    curves = read_csv(folder / "approximation.curves.csv")
    figure = new_figure(3.1 * len(nearest), 7)
    panels = figure.subplots(2, len(nearest))
    for target, above, below in zip(nearest, *panels, strict=True):
        _draw_curves(above, [row for row in curves if row["target"] == target])
        _draw_budgets(below, nearest[target], descent[target])
        above.set_title(target, fontsize=11)
        above.set_xlabel("steps of gradient descent")
        below.set_xlabel("parameters")
        for axes in (above, below):
            tidy(axes)
    for row in panels:
        row[0].set_ylabel("relative Frobenius error")
        row[-1].legend(*row[0].get_legend_handles_labels(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "approximation.png", dpi=130)


def _draw_curves(axes: Axes, rows: Sequence[Mapping[str, str]]) -> None:
    lines: dict[Kind, list[list[float]]] = {}
    for row in rows:
        if row["family"] not in ("LowRank", "Kronecker"):
            lines.setdefault(_kind(row), []).append([float(row[name]) for name in ("step", "mean", "std")])
    blues = iter(colormaps["Blues"](np.linspace(0.35, 1, len(SIZES))))
    for kind, points in lines.items():
        steps, mean, deviation = np.transpose(points)
        style = {"color": next(blues)} if kind.size else {"color": COLOURS[kind.family], "ls": "--"}
        axes.plot(steps + 1, mean, lw=1.5, label=kind.title, **style)
        axes.fill_between(steps + 1, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, lw=0)
    axes.set_xscale("log")


def _draw_budgets(axes: Axes, nearest: Mapping[Kind, list[float]], descent: Mapping[Kind, list[float]]) -> None:
    for family, colour in COLOURS.items():
        mine = [kind for kind in nearest if kind.family == family]
        budgets = [kind.parameters for kind in mine]
        means, deviations = zip(
            *((statistics.mean(e), statistics.stdev(e)) for e in map(nearest.get, mine)), strict=True
        )
        title = _abstract(mine[0]).title
        axes.errorbar(budgets, means, deviations, color=colour, label=title, marker="o", ms=4, lw=1.5)
        descended = [statistics.mean(descent[kind]) for kind in mine]
        axes.plot(budgets, descended, "o", ms=8, mfc="none", color=colour)
    axes.plot([], [], "o", ms=8, mfc="none", color="grey", label="by gradient descent")
    axes.plot([], [], "o-", ms=4, lw=1.5, color="grey", label="nearest known")
    axes.set_xscale("log")
    axes.set_xticks([SIDE, 4 * SIDE, 40 * SIDE])
    axes.get_xaxis().set_major_formatter("{x:,.0f}")
    axes.minorticks_off()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, write and draw its results, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=10, help="targets of each kind, at least 2")
    parser.add_argument("--steps", type=int, default=2000, help="steps of gradient descent")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(arguments)
    if options.trials < 2 or options.steps < 1:
        raise UserError(f"--trials must be at least 2 and --steps 1, got {options.trials} and {options.steps}")
    errors, curves = run(options.trials, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "approximation.csv", ERROR_COLUMNS, errors)
    write_csv(options.out / "approximation.curves.csv", CURVE_COLUMNS, curves)
    draw(options.out)
    print("\n\n".join(tables(options.out).values()))


if __name__ == "__main__":
    command(main)
