"""Measure which structure fits a positive semi-definite matrix best, with 50 parameters each.

    python -m experiments.psd

The first study of arXiv 2406.17740 (Figure 1, left): a random 50 x 50 matrix is approximated by a matrix of rank one,
`u u^T`; the Kronecker product `A (x) A^T` of a 10 x 5 matrix; a circulant; and a symmetric Toeplitz matrix. Each is
fitted by gradient descent, and exactly, since all four have an optimum in closed form:

- Circulant and symmetric Toeplitz: the mean of the target over each (wrapped) diagonal.
- Rank one: for every N, `||N - a a^T||^2 = ||N||^2 - 2 a^T N a + ||a||^4` is smallest at the leading eigenvector of the
  symmetric part of N, times the root of its eigenvalue.
- Kronecker: rearrange the entries of the target so that row (i, j) and column (q, p) hold entry `(5 i + p, 10 j + q)`.
  Then `A (x) A^T` becomes `a a^T`, where a are the entries of A, and the problem is the previous one.

The paper reports the same order in each of 10 trials: rank one is the worst, then Kronecker, circulant, Toeplitz. The
trials with this order are counted for two readings of "rows of unit length", and for factors of other widths.

Writes `experiments/results/psd.csv` and `psd.png`, or to `--out=FOLDER`, and prints the tables.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float
from matplotlib.axes import Axes

from experiments.command import command
from experiments.descent import descend, relative_errors
from experiments.grid import RESULTS
from experiments.tables import markdown, mean_and_deviation, new_figure, read_csv, tidy, write_csv
from surm_jax.errors import UserError
from surm_jax.structured import Circulant, Kronecker, LowRank, SymmetricToeplitz

SIDE = 50
FACTOR = (10, 5)
LEARNING_RATE = 0.1
START_SCALE = 0.03
WIDTHS = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Family(NamedTuple):
    """A family: the shape of its parameters, the matrix that they make, and the nearest member to a target."""

    parameters: tuple[int, ...]
    dense: Callable[[Array], Float[Array, "n n"]]
    nearest: Callable[[Float[Array, "n n"]], Float[Array, "n n"]]


def _rank_one(u: Float[Array, " n"]) -> Float[Array, "n n"]:
    return LowRank(down=u[:, None], up=u[None]).to_dense()


def _kronecker(A: Float[Array, "m n"]) -> Float[Array, "mn mn"]:
    return Kronecker(A=A[None], B=A.T[None]).to_dense()


def nearest_rank_one(target: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return the nearest `u u^T` in the Frobenius norm."""
    return _rank_one(_leading(target))


def nearest_kronecker(target: Float[Array, "mn mn"]) -> Float[Array, "mn mn"]:
    """Return the nearest `A (x) A^T` in the Frobenius norm, where A has the shape `FACTOR`."""
    m, n = FACTOR
    # Axes i, p, j, q of the target become (i, j) and (q, p).
    rearranged = target.reshape(m, n, n, m).transpose(0, 2, 3, 1).reshape(m * n, m * n)
    return _kronecker(_leading(rearranged).reshape(m, n))


def _leading(N: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Return the vector a whose `a a^T` is nearest to N."""
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
    """Return `X X^T` for a normal X with rows scaled to unit length: positive semi-definite, ones on the diagonal."""
    X = rng.normal(size=(SIDE, width))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X @ X.T


def scaled_rows(rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Return `X X^T` for a normal X, with the rows of the product scaled to unit length: no longer symmetric."""
    X = rng.normal(size=(SIDE, SIDE))
    M = X @ X.T
    return M / np.linalg.norm(M, axis=1, keepdims=True)


TARGETS = {"unit factor rows": gram, "unit matrix rows": scaled_rows}


class Row(NamedTuple):
    """The relative errors of a family for one target, after descent and at the optimum; descent may be missing."""

    target: str
    width: int
    family: str
    trial: int
    descent: float | None
    optimum: float


OTHER_WIDTHS, IDENTITY = "other widths", "identity"
Curves = dict[str, Float[np.ndarray, "trials steps+1"]]


def optimal_errors(targets: Float[np.ndarray, "trials n n"]) -> dict[str, Float[np.ndarray, " trials"]]:
    """Return the relative errors of the nearest matrix of every family."""
    return {
        name: np.asarray(relative_errors(jax.vmap(family.nearest)(targets), targets))
        for name, family in FAMILIES.items()
    }


def identity_errors(targets: Float[np.ndarray, "trials n n"]) -> Float[np.ndarray, " trials"]:
    """Return the relative errors of the best multiple of the identity, which is a single number."""
    traces = np.trace(targets, axis1=1, axis2=2)
    return np.sqrt(1 - traces**2 / SIDE / np.sum(np.square(targets), axis=(1, 2)))


def run(trials: int, steps: int) -> tuple[list[Row], Curves]:
    """Make the study; a bar shows the progress.

    Returns:
        The errors, and the training curves of each family for the first kind of target.
    """
    rows, curves = [], {}

    def draw_targets(make: Callable[[np.random.Generator], np.ndarray]) -> Float[np.ndarray, "trials n n"]:
        return np.stack([make(np.random.default_rng(trial)) for trial in range(trials)]).astype(np.float32)

    with tqdm.tqdm(total=len(TARGETS) * len(FAMILIES) + len(WIDTHS), unit="fit") as bar:
        for target, make in TARGETS.items():
            targets = draw_targets(make)
            optima = optimal_errors(targets)
            for name, family in FAMILIES.items():
                bar.set_description(f"{target}, {name}")
                starts = START_SCALE * jax.random.normal(jax.random.key(0), (trials, *family.parameters))
                _, errors = descend(family.dense, starts, targets, steps=steps, learning_rate=LEARNING_RATE)
                curves.setdefault(name, np.asarray(errors))
                pairs = enumerate(zip(np.asarray(errors)[:, -1], optima[name], strict=True))
                rows += [Row(target, SIDE, name, trial, *map(float, pair)) for trial, pair in pairs]
                bar.update()
            identity = enumerate(identity_errors(targets))
            rows += [Row(target, SIDE, IDENTITY, trial, None, float(error)) for trial, error in identity]
        for width in WIDTHS:
            bar.set_description(f"width {width}")
            optima = optimal_errors(draw_targets(lambda rng, width=width: gram(rng, width)))
            for name, errors in optima.items():
                pairs = enumerate(map(float, errors))
                rows += [Row(OTHER_WIDTHS, width, name, trial, None, error) for trial, error in pairs]
            bar.update()
    return rows, curves


def order(errors: Mapping[str, Float[np.ndarray, " trials"]]) -> dict[str, int]:
    """Return in how many trials each family is worse than the next, and in how many the whole order holds.

    >>> order({"a": np.array([3, 3]), "b": np.array([2, 1]), "c": np.array([1, 2])})
    {'a > b': 2, 'b > c': 1, 'a > b > c': 1}
    """
    names = list(errors)
    worse = {f"{one} > {other}": errors[one] > errors[other] for one, other in itertools.pairwise(names)}
    worse[" > ".join(names)] = np.all(list(worse.values()), axis=0)
    return {claim: int(np.sum(holds)) for claim, holds in worse.items()}


def errors_of(rows: Sequence[Row], column: str, target: str, width: int = SIDE) -> dict[str, np.ndarray]:
    """Return a column of errors by family, from the worst family to the best as the paper reports them."""
    return {
        name: np.array([getattr(row, column) for row in rows if row[:3] == (target, width, name)]) for name in FAMILIES
    }


def read(folder: Path) -> list[Row]:
    """Return the rows of `psd.csv` in a folder."""
    return [
        Row(row["target"], int(row["width"]), row["family"], int(row["trial"]),
            float(row["descent"]) if row["descent"] else None, float(row["optimum"]))
        for row in read_csv(folder / "psd.csv")
    ]  # fmt: skip


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return the errors and the order for both kinds of targets, and the optima by width."""
    rows, found = read(folder), {}
    for target in TARGETS:
        descent, optimum = (errors_of(rows, column, target) for column in ("descent", "optimum"))
        identity = [row.optimum for row in rows if (row.target, row.family) == (target, IDENTITY)]
        lines = [
            {"family": name, "gradient descent": _cell(descent[name]), "optimum": _cell(optimum[name])}
            for name in FAMILIES
        ]
        lines.append({"family": "a multiple of the identity (1 number)", "optimum": _cell(identity)})
        found[target] = markdown(lines, {"family": "", "gradient descent": ">", "optimum": ">"})
        counts = zip(order(descent).items(), order(optimum).values(), strict=True)
        claim = f"worse than the next, in how many of {len(identity)} trials"
        lines = [{claim: text, "gradient descent": one, "optimum": other} for (text, one), other in counts]
        found[f"order, {target}"] = markdown(lines, {claim: "", "gradient descent": "d", "optimum": "d"})
    lines = []
    for width in sorted({row.width for row in rows if row.target == OTHER_WIDTHS}):
        errors = errors_of(rows, "optimum", OTHER_WIDTHS, width)
        *_, whole = order(errors).values()
        cells = {name: _cell(values) for name, values in errors.items()}
        lines.append({"width of X": width, **cells, "whole order": f"{whole} of {len(errors['circulant'])}"})
    return found | {"widths": markdown(lines, {"width of X": "d"} | dict.fromkeys([*FAMILIES, "whole order"], ">"))}


def _cell(errors: Sequence[float]) -> str:
    return mean_and_deviation([float(error) for error in errors], digits=4)


def draw(rows: Sequence[Row], curves: Curves, path: Path) -> None:
    """Draw the errors by family, the training curves, and the optima against the width of the factor."""
    figure = new_figure(12, 3.9)
    by_family, by_step, by_width = figure.subplots(1, 3)
    _draw_families(by_family, rows, next(iter(TARGETS)))
    for name, errors in curves.items():
        steps, mean, deviation = np.arange(errors.shape[1]), errors.mean(axis=0), errors.std(axis=0, ddof=1)
        by_step.plot(steps + 1, mean, color=COLOURS[name], label=name)
        by_step.fill_between(steps + 1, mean - deviation, mean + deviation, color=COLOURS[name], alpha=0.2, lw=0)
    by_step.set_xlabel("steps of gradient descent")
    by_step.set_title(f"Mean ± deviation of {len(errors)} trials", fontsize=10)
    optima = [errors_of(rows, "optimum", OTHER_WIDTHS, width) for width in WIDTHS]
    for name in FAMILIES:
        errors = np.stack([of_width[name] for of_width in optima])
        mean, deviation = errors.mean(axis=1), errors.std(axis=1, ddof=1)
        by_width.errorbar(WIDTHS, mean, deviation, color=COLOURS[name], marker="o", ms=4, label=name)
    by_width.axvline(SIDE, color="grey", ls=":", lw=1)
    by_width.set_xlabel(f"width of the factor X (dotted: {SIDE}, as on the left)")
    by_width.set_title("Optima for other targets", fontsize=10)
    by_width.legend(frameon=False, loc="lower left")
    for axes in (by_step, by_width):
        axes.set_xscale("log")
        axes.set_ylim(0, 1.05)
    for axes in (by_family, by_step, by_width):
        tidy(axes)
    by_family.set_ylabel("relative Frobenius error")
    figure.savefig(path, dpi=150)


def _draw_families(axes: Axes, rows: Sequence[Row], target: str) -> None:
    descent, optimum = (errors_of(rows, column, target) for column in ("descent", "optimum"))
    for place, name in enumerate(FAMILIES):
        spread = place + np.linspace(-0.25, 0.25, len(optimum[name]))
        axes.plot(spread, optimum[name], "_", ms=9, mew=2, color=COLOURS[name])
        axes.plot(spread, descent[name], "o", ms=5, mfc="none", color=COLOURS[name])
    axes.plot([], [], "_", ms=9, mew=2, color="grey", label="optimum")
    axes.plot([], [], "o", ms=5, mfc="none", color="grey", label="gradient descent")
    identity = [row.optimum for row in rows if (row.target, row.family) == (target, IDENTITY)]
    axes.axhline(statistics.mean(identity), color="grey", ls="--", lw=1, label="multiple of the identity")
    axes.set_xticks(range(len(FAMILIES)), FAMILIES)
    axes.set_ylim(0.65, 1)
    axes.set_title(f"All trials ({target})", fontsize=10)
    axes.legend(frameon=False, loc="center left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the study, write and draw its results, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=10, help="targets of each kind, at least 2")
    parser.add_argument("--steps", type=int, default=5000, help="steps of gradient descent")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(arguments)
    if options.trials < 2 or options.steps < 1:
        raise UserError(f"--trials must be at least 2 and --steps 1, got {options.trials} and {options.steps}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows, curves = run(options.trials, options.steps)
    lines = [(*row[:4], *("" if error is None else f"{error:.6f}" for error in row[4:])) for row in rows]
    write_csv(options.out / "psd.csv", Row._fields, lines)
    draw(rows, curves, options.out / "psd.png")
    print("\n\n".join(tables(options.out).values()))


if __name__ == "__main__":
    command(main)
