"""Which structure fits a positive semi-definite matrix best, with 50 numbers each: the order, and where it holds.

    python -m experiments.psd

The first study of arXiv 2406.17740 (Figure 1, left): a random 50 x 50 matrix is approximated by a matrix of rank one,
`u u^T`; the Kronecker product `A (x) A^T` of a 10 x 5 matrix; a circulant; and a symmetric Toeplitz matrix. Gradient
descent stands beside the exact optimum, which all four have:

- circulant and symmetric Toeplitz: the mean of the target over each (wrapped) diagonal;
- rank one: for every N, `||N - a a^T||^2 = ||N||^2 - 2 a^T N a + ||a||^4` is smallest at the leading eigenvector of the
  symmetric part of N, times the root of its eigenvalue;
- Kronecker: with the entries of the target rearranged so that row (i, j) and column (q, p) hold entry
  `(5 i + p, 10 j + q)`, `A (x) A^T` becomes `a a^T`, where a are the entries of A. So it is the same problem.

The paper reports the same order in each of 10 trials: rank one is the worst, then Kronecker, circulant, Toeplitz. The
order is checked and printed, for two readings of "rows of unit length", and for factors of other widths.

Writes `experiments/results/psd.csv`, `.md` and `.png`; with `--out=FOLDER` they go there.
"""

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.command import command
from experiments.descent import MOMENTUM, descend, relative_errors
from surm_jax.errors import UserError
from surm_jax.structured import Circulant, Kronecker, LowRank, SymmetricToeplitz

RESULTS = Path(__file__).parent / "results"
SIDE = 50
FACTOR = (10, 5)
LEARNING_RATE = 0.1
START_SCALE = 0.03
WIDTHS = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Family(NamedTuple):
    """A family of matrices: its parameters make a matrix, and a target has a nearest one."""

    parameters: tuple[int, ...]
    dense: Callable[[Array], Float[Array, "n n"]]
    nearest: Callable[[Float[Array, "n n"]], Float[Array, "n n"]]


def _rank_one(u: Float[Array, " n"]) -> Float[Array, "n n"]:
    return LowRank(down=u[:, None], up=u[None]).to_dense()


def _kronecker(A: Float[Array, "m n"]) -> Float[Array, "mn mn"]:
    return Kronecker(A=A[None], B=A.T[None]).to_dense()


def nearest_rank_one(target: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns the nearest `u u^T` in the Frobenius norm."""
    return _rank_one(_leading(target))


def nearest_kronecker(target: Float[Array, "mn mn"]) -> Float[Array, "mn mn"]:
    """Returns the nearest `A (x) A^T` in the Frobenius norm, A of the shape `FACTOR`."""
    m, n = FACTOR
    # Axes i, p, j, q of the target become (i, j) and (q, p).
    rearranged = target.reshape(m, n, n, m).transpose(0, 2, 3, 1).reshape(m * n, m * n)
    return _kronecker(_leading(rearranged).reshape(m, n))


def _leading(N: Float[Array, "n n"]) -> Float[Array, " n"]:
    """The vector a for which `a a^T` is nearest to N."""
    values, vectors = jnp.linalg.eigh((N + N.T) / 2)
    return jnp.sqrt(jnp.maximum(values[-1], 0)) * vectors[:, -1]


# From the worst to the best, as the paper reports them.
FAMILIES = {
    "rank one": Family((SIDE,), _rank_one, nearest_rank_one),
    "Kronecker": Family(FACTOR, _kronecker, nearest_kronecker),
    "circulant": Family(
        (SIDE,), lambda c: Circulant(c, shape=(SIDE, SIDE)).to_dense(), lambda M: Circulant.nearest(M).to_dense()
    ),
    "Toeplitz": Family(
        (SIDE,),
        lambda t: SymmetricToeplitz(t, shape=(SIDE, SIDE)).to_dense(),
        lambda M: SymmetricToeplitz.nearest(M).to_dense(),
    ),
}
COLOURS = dict(zip(FAMILIES, ("#d62728", "#ff7f0e", "#111111", "#9467bd"), strict=True))


def gram(rng: np.random.Generator, width: int = SIDE) -> Float[np.ndarray, "n n"]:
    """Returns `X X^T` with normal X, its rows scaled to unit length: positive semi-definite, ones on the diagonal."""
    X = rng.normal(size=(SIDE, width))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X @ X.T


def scaled_rows(rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns `X X^T` with normal X, whose own rows are then scaled to unit length: not symmetric any more."""
    X = rng.normal(size=(SIDE, SIDE))
    M = X @ X.T
    return M / np.linalg.norm(M, axis=1, keepdims=True)


TARGETS = {"unit factor rows": gram, "unit matrix rows": scaled_rows}


class Study(NamedTuple):
    """Relative errors by target and family: after descent and at the optimum (trials,), curves (trials, steps + 1).

    `identity` is the error of the best multiple of the identity, one number, by target. `widths` has the errors at the
    optimum by family, (widths, trials), for factors X of other widths.
    """

    descent: dict[str, dict[str, Float[np.ndarray, " trials"]]]
    optimum: dict[str, dict[str, Float[np.ndarray, " trials"]]]
    curves: dict[str, dict[str, Float[np.ndarray, "trials steps+1"]]]
    identity: dict[str, Float[np.ndarray, " trials"]]
    widths: dict[str, Float[np.ndarray, "widths trials"]]


def optimal_errors(targets: Float[np.ndarray, "trials n n"]) -> dict[str, Float[np.ndarray, " trials"]]:
    """Returns the relative errors of the nearest matrix of every family."""
    return {
        name: np.asarray(relative_errors(jax.vmap(family.nearest)(targets), targets))
        for name, family in FAMILIES.items()
    }


def identity_errors(targets: Float[np.ndarray, "trials n n"]) -> Float[np.ndarray, " trials"]:
    """Returns the relative errors of the best multiple of the identity."""
    traces = np.trace(targets, axis1=1, axis2=2)
    return np.sqrt(1 - traces**2 / SIDE / np.sum(np.square(targets), axis=(1, 2)))


def run(trials: int, steps: int) -> Study:
    """Makes the whole study; a bar shows the progress."""
    study = Study({}, {}, {}, {}, {})
    with tqdm.tqdm(total=len(TARGETS) * len(FAMILIES) + len(WIDTHS), unit="fit") as bar:
        for target, make in TARGETS.items():
            targets = np.stack([make(np.random.default_rng(trial)) for trial in range(trials)]).astype(np.float32)
            study.optimum[target], study.identity[target] = optimal_errors(targets), identity_errors(targets)
            study.curves[target], study.descent[target] = {}, {}
            for name, family in FAMILIES.items():
                bar.set_description(f"{target}, {name}")
                starts = START_SCALE * jax.random.normal(jax.random.key(0), (trials, *family.parameters))
                _, curves = descend(family.dense, starts, targets, steps=steps, learning_rate=LEARNING_RATE)
                study.curves[target][name], study.descent[target][name] = np.asarray(curves), np.asarray(curves[:, -1])
                bar.update()
        by_width = []
        for width in WIDTHS:
            bar.set_description(f"width {width}")
            targets = np.stack([gram(np.random.default_rng(trial), width) for trial in range(trials)])
            by_width.append(optimal_errors(targets.astype(np.float32)))
            bar.update()
    study.widths.update({name: np.stack([errors[name] for errors in by_width]) for name in FAMILIES})
    return study


def order(errors: dict[str, Float[np.ndarray, " trials"]]) -> dict[str, int]:
    """Returns in how many trials each family is worse than the next, and in how many the whole order holds.

    >>> order({"a": np.array([3, 3]), "b": np.array([2, 1]), "c": np.array([1, 2])})
    {'a > b': 2, 'b > c': 1, 'a > b > c': 1}
    """
    names = list(errors)
    worse = {f"{one} > {other}": errors[one] > errors[other] for one, other in itertools.pairwise(names)}
    worse[" > ".join(names)] = np.all(list(worse.values()), axis=0)
    return {claim: int(np.sum(holds)) for claim, holds in worse.items()}


def _summary(errors: Sequence[float]) -> tuple[float, float]:
    values = [float(error) for error in errors]
    return statistics.mean(values), statistics.stdev(values)


def _cell(errors: Sequence[float]) -> str:
    mean, deviation = _summary(errors)
    return f"{mean:.4f} ± {deviation:.4f}"


def write_csv(study: Study, path: Path) -> None:
    """Writes the errors of every trial; those for other widths have no descent."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["target", "width", "family", "trial", "descent", "optimum"])
        for target in TARGETS:
            for name in FAMILIES:
                pairs = zip(study.descent[target][name], study.optimum[target][name], strict=True)
                for trial, (descent, optimum) in enumerate(pairs):
                    rows.writerow([target, SIDE, name, trial, f"{descent:.6f}", f"{optimum:.6f}"])
        for name, by_width in study.widths.items():
            for width, errors in zip(WIDTHS, by_width, strict=True):
                for trial, error in enumerate(errors):
                    rows.writerow(["other widths", width, name, trial, "", f"{error:.6f}"])


def report(study: Study, trials: int, steps: int) -> str:
    """Returns the text of `psd.md`."""
    lines = [
        f"# A {SIDE} x {SIDE} positive semi-definite matrix in {SIDE} numbers",
        "",
        f"`python -m experiments.psd`: relative Frobenius errors, mean ± standard deviation of {trials} trials. After "
        "arXiv 2406.17740, Figure 1, left.",
        f"Gradient descent: {steps:,} steps with learning rate {LEARNING_RATE} (the paper's) and momentum {MOMENTUM} "
        "on the squared relative error.",
        "The optimum is exact for every family; how it is found is said in `psd.py`.",
        "",
        '"Rows of unit length" can mean two things. **Unit factor rows**: `X X^T` with normal X, the rows of X scaled; '
        "**unit matrix rows**:",
        "the rows of `X X^T` itself scaled, which then is not symmetric.",
    ]
    for target in TARGETS:
        lines += ["", f"## {target[0].upper()}{target[1:]}", "", "| family | gradient descent | optimum |"]
        lines += ["|---|---:|---:|"]
        for name in FAMILIES:
            lines.append(f"| {name} | {_cell(study.descent[target][name])} | {_cell(study.optimum[target][name])} |")
        lines += [f"| a multiple of the identity (1 number) | | {_cell(study.identity[target])} |", ""]
        lines += [f"| worse than the next, in how many of {trials} trials | gradient descent | optimum |"]
        lines += ["|---|---:|---:|"]
        descent, optimum = order(study.descent[target]), order(study.optimum[target])
        lines += [f"| {claim} | {holds} | {optimum[claim]} |" for claim, holds in descent.items()]
    lines += [
        "",
        "## Where the order holds",
        "",
        f"The optima for `X X^T` with unit rows of a normal {SIDE} x width matrix X. The wider X is, the nearer is the "
        "target to the identity,",
        "which circulant and Toeplitz matrices hold, and of which a Kronecker product holds more than a matrix of rank "
        "one.",
        "",
        "| width of X | " + " | ".join(FAMILIES) + " | whole order |",
        "|---:|" + "---:|" * (len(FAMILIES) + 1),
    ]
    for index, width in enumerate(WIDTHS):
        errors = {name: by_width[index] for name, by_width in study.widths.items()}
        *_, whole = order(errors).values()
        lines.append(f"| {width} | " + " | ".join(map(_cell, errors.values())) + f" | {whole} of {trials} |")
    return "\n".join(lines) + "\n\n![errors by family, training curves, errors by width](psd.png)\n"


def draw(study: Study, path: Path) -> None:
    """Draws errors by family, training curves, and the optima against the width of the factor."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    by_family, curves, widths = figure.subplots(1, 3)
    target = next(iter(TARGETS))
    _draw_families(by_family, study, target)
    for name, errors in study.curves[target].items():
        steps, mean, deviation = np.arange(errors.shape[1]), errors.mean(axis=0), errors.std(axis=0, ddof=1)
        curves.plot(steps + 1, mean, color=COLOURS[name], label=name)
        curves.fill_between(steps + 1, mean - deviation, mean + deviation, color=COLOURS[name], alpha=0.2, lw=0)
    curves.set_xscale("log")
    curves.set_xlabel("steps of gradient descent")
    curves.set_title(f"Mean ± deviation of {errors.shape[0]} trials", fontsize=10)
    for name, errors in study.widths.items():
        mean, deviation = errors.mean(axis=1), errors.std(axis=1, ddof=1)
        widths.errorbar(WIDTHS, mean, deviation, color=COLOURS[name], marker="o", ms=4, label=name)
    widths.axvline(SIDE, color="grey", ls=":", lw=1)
    widths.set_xscale("log")
    widths.set_xlabel(f"width of the factor X (dotted: {SIDE}, as on the left)")
    widths.set_title("Optima for other targets", fontsize=10)
    widths.legend(frameon=False, loc="lower left")
    for axes in (curves, widths):
        axes.set_ylim(0, 1.05)
    for axes in (by_family, curves, widths):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_family.set_ylabel("relative Frobenius error")
    figure.savefig(path, dpi=150)


def _draw_families(axes: Axes, study: Study, target: str) -> None:
    spread = np.linspace(-0.25, 0.25, len(study.identity[target]))
    for place, name in enumerate(FAMILIES):
        descent, optimum = study.descent[target][name], study.optimum[target][name]
        axes.plot(place + spread, optimum, "_", ms=9, mew=2, color=COLOURS[name])
        axes.plot(place + spread, descent, "o", ms=5, mfc="none", color=COLOURS[name])
    axes.plot([], [], "_", ms=9, mew=2, color="grey", label="optimum")
    axes.plot([], [], "o", ms=5, mfc="none", color="grey", label="gradient descent")
    axes.axhline(study.identity[target].mean(), color="grey", ls="--", lw=1, label="multiple of the identity")
    axes.set_xticks(range(len(FAMILIES)), FAMILIES)
    axes.set_ylim(0.65, 1)
    axes.set_title("All trials (unit factor rows)", fontsize=10)
    axes.legend(frameon=False, loc="center left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, writes, draws, and prints the order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=10, help="how many targets of each kind, at least 2")
    parser.add_argument("--steps", type=int, default=5000, help="how many of gradient descent")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(arguments)
    if options.trials < 2 or options.steps < 1:
        raise UserError(f"--trials must be at least 2 and --steps 1, got {options.trials} and {options.steps}")
    options.out.mkdir(parents=True, exist_ok=True)
    study = run(options.trials, options.steps)
    write_csv(study, options.out / "psd.csv")
    draw(study, options.out / "psd.png")
    (options.out / "psd.md").write_text(text := report(study, options.trials, options.steps))
    print(text)


if __name__ == "__main__":
    command(main)
