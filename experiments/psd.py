"""Compare how well four structures of 50 parameters each approximate a positive semi-definite matrix.

    python -m experiments.psd

This is the first study of arXiv 2406.17740 (Figure 1, left). A random 50 x 50 target matrix is approximated by a
rank-one matrix `u u^T`, by the Kronecker product `A (x) A^T` of a 10 x 5 matrix A, by a circulant matrix, and by a
symmetric Toeplitz matrix. Each structure is fitted twice: by gradient descent, and exactly, since the nearest matrix of
each structure has a closed form:

- Circulant: each parameter is the mean of the target's entries on one diagonal, which continues at the opposite edge.
- Symmetric Toeplitz: each parameter is the mean of the target's entries on one diagonal and on its mirror image.
- Rank one: for every square matrix N, `||N - a a^T||^2 = ||N||^2 - 2 a^T N a + ||a||^4` is smallest when a is the
  leading eigenvector of the symmetric part of N, times the square root of its eigenvalue.
- Kronecker: rearrange the entries of the target so that row (i, j) and column (q, p) hold entry `(5 i + p, 10 j + q)`,
  where i and q are below 10, and j and p below 5. The same rearrangement turns `A (x) A^T` into `a a^T`, where the
  vector a holds the entries of A. So the problem becomes the rank-one problem.

In each of its 10 trials the paper finds the same order of errors: rank one has the largest error, then Kronecker, then
circulant, and Toeplitz has the smallest. This experiment counts the trials in which that order holds. The paper draws a
matrix "with rows of unit length", which can be read in two ways, so both kinds of targets are measured (`TARGETS`).
Further targets, `X X^T` for random matrices X with different numbers of columns (`WIDTHS`), show how the errors depend
on this number.

The experiment writes `psd.csv` and `psd.png` to `experiments/results`, or to the folder given by `--out`, and prints
the tables.
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
    """A family of structured 50 x 50 matrices with 50 parameters.

    Attributes:
        parameters: The shape of the array of parameters.
        dense: Returns the matrix as a dense array, given the array of parameters.
        nearest: Returns the matrix of the family that is nearest to a target in the Frobenius norm, as a dense array.
    """

    parameters: tuple[int, ...]
    dense: Callable[[Array], Float[Array, "n n"]]
    nearest: Callable[[Float[Array, "n n"]], Float[Array, "n n"]]


def _rank_one(u: Float[Array, " n"]) -> Float[Array, "n n"]:
    return LowRank(down=u[:, None], up=u[None]).to_dense()


def _kronecker(A: Float[Array, "m n"]) -> Float[Array, "mn mn"]:
    return Kronecker(A=A[None], B=A.T[None]).to_dense()


def nearest_rank_one(target: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return the matrix of the form `u u^T` that is nearest to the target in the Frobenius norm."""
    return _rank_one(_leading(target))


def nearest_kronecker(target: Float[Array, "mn mn"]) -> Float[Array, "mn mn"]:
    """Return the matrix of the form `A (x) A^T` that is nearest to the target in the Frobenius norm.

    A has the shape `FACTOR`.
    """
    m, n = FACTOR
    # Give the target the axes (i, p, j, q), and make a matrix with rows (i, j) and columns (q, p) of it: see the
    # docstring of this module.
    rearranged = target.reshape(m, n, n, m).transpose(0, 2, 3, 1).reshape(m * n, m * n)
    return _kronecker(_leading(rearranged).reshape(m, n))


def _leading(N: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Return the vector a for which `a a^T` is nearest to N in the Frobenius norm, by an eigenvector of N."""
    values, vectors = jnp.linalg.eigh((N + N.T) / 2)
    return jnp.sqrt(jnp.maximum(values[-1], 0)) * vectors[:, -1]


# In the order of errors that the paper reports, the largest error first.
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
    """Return `X X^T`, where X is a Gaussian matrix whose rows are scaled to unit length.

    The result is positive semi-definite and has ones on its diagonal.

    Args:
        rng: The random generator that X is drawn from.
        width: The number of columns of X.
    """
    X = rng.normal(size=(SIDE, width))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X @ X.T


def scaled_rows(rng: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Return `X X^T` for a Gaussian matrix X, with the rows of the product scaled to unit length.

    The scaling makes the matrix unsymmetric.

    Args:
        rng: The random generator that X is drawn from.
    """
    X = rng.normal(size=(SIDE, SIDE))
    M = X @ X.T
    return M / np.linalg.norm(M, axis=1, keepdims=True)


TARGETS = {"unit factor rows": gram, "unit matrix rows": scaled_rows}


class Row(NamedTuple):
    """The relative Frobenius errors of one family for one target matrix.

    Attributes:
        target: The kind of target, a key of `TARGETS`, or `OTHER_WIDTHS`.
        width: The number of columns of the matrix X that the target was made from.
        family: A key of `FAMILIES`, or `IDENTITY`.
        trial: The number of the trial, which is also the seed of the target.
        descent: The error after gradient descent. None if the study does no gradient descent for this target or family.
        optimum: The error of the nearest matrix of the family.
    """

    target: str
    width: int
    family: str
    trial: int
    descent: float | None
    optimum: float


OTHER_WIDTHS, IDENTITY = "other widths", "identity"
Curves = dict[str, Float[np.ndarray, "trials steps+1"]]


def optimal_errors(targets: Float[np.ndarray, "trials n n"]) -> dict[str, Float[np.ndarray, " trials"]]:
    """Return, for each family, the relative error of the family's nearest matrix for every target."""
    return {
        name: np.asarray(relative_errors(jax.vmap(family.nearest)(targets), targets))
        for name, family in FAMILIES.items()
    }


def identity_errors(targets: Float[np.ndarray, "trials n n"]) -> Float[np.ndarray, " trials"]:
    """Return, for every target, the relative error of the nearest multiple of the identity matrix.

    The multiples of the identity are a reference that has a single parameter.
    """
    traces = np.trace(targets, axis1=1, axis2=2)
    return np.sqrt(1 - traces**2 / SIDE / np.sum(np.square(targets), axis=(1, 2)))


def run(trials: int, steps: int) -> tuple[list[Row], Curves]:
    """Fit all families to all targets, and show a progress bar.

    Args:
        trials: The number of targets of each kind.
        steps: The number of steps of gradient descent.

    Returns:
        The rows of errors, and the errors of each family before the first step of gradient descent and after each step.
        The errors by step belong to targets of the first kind in `TARGETS`.
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
    """Count the trials in which each family has a larger error than the next one, and those in which all have.

    In the example, a has a larger error than b in both trials, but b than c only in the first:

    >>> order({"a": np.array([3, 3]), "b": np.array([2, 1]), "c": np.array([1, 2])})
    {'a > b': 2, 'b > c': 1, 'a > b > c': 1}
    """
    names = list(errors)
    worse = {f"{one} > {other}": errors[one] > errors[other] for one, other in itertools.pairwise(names)}
    worse[" > ".join(names)] = np.all(list(worse.values()), axis=0)
    return {claim: int(np.sum(holds)) for claim, holds in worse.items()}


def errors_of(rows: Sequence[Row], column: str, target: str, width: int = SIDE) -> dict[str, np.ndarray]:
    """Return the errors of all trials for each family, in the order of `FAMILIES`.

    Args:
        rows: The rows of the study.
        column: Which error to return, "descent" or "optimum".
        target: The kind of target, as in `Row`.
        width: The number of columns of the matrix X that the targets were made from.
    """
    return {
        name: np.array([getattr(row, column) for row in rows if row[:3] == (target, width, name)]) for name in FAMILIES
    }


def read(folder: Path) -> list[Row]:
    """Return the rows of the file `psd.csv` in a folder."""
    return [
        Row(row["target"], int(row["width"]), row["family"], int(row["trial"]),
            float(row["descent"]) if row["descent"] else None, float(row["optimum"]))
        for row in read_csv(folder / "psd.csv")
    ]  # fmt: skip


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Return all tables of the study in markdown, by their names.

    Each kind of target has a table of the errors, and a table that counts the trials in which the paper's order of
    families holds. The table "widths" has the errors of the nearest matrices by the number of columns of X.
    """
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
    """Draw a picture of three panels.

    They show the errors by family, the errors during gradient descent, and the errors of the nearest matrices against
    the number of columns of the matrix X.
    """
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
    """Run the study, write and draw its results, and print the tables."""
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
