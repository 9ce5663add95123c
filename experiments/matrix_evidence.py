"""What the studies of matrices say of the paper's claims: PSD targets, approximation, and the pinwheel."""

import itertools
import statistics
from typing import NamedTuple

from experiments.evidence import read, values
from experiments.grid import mean_and_deviation
from experiments.verdicts import (
    FAILS,
    HOLDS,
    IN_PART,
    Measured,
    at_least,
    at_most,
    everywhere,
    gap,
    share,
    somewhere,
)


def psd_order() -> Measured | None:
    """The order of errors of the PSD study."""
    rows = read("psd.csv")
    families = ("rank one", "Kronecker", "circulant", "Toeplitz")

    def errors(width: str, target: str) -> list[list[float]]:
        return [values(rows, "optimum", target=target, width=width, family=family) for family in families]

    def ordered(columns: list[list[float]]) -> int:
        return sum(list(trial) == sorted(trial, reverse=True) for trial in zip(*columns, strict=True))

    square = errors("50", "unit factor rows")
    if not all(square):
        return None
    wide = [row["width"] for row in rows if row["target"] == "other widths"]
    holding = [w for w in sorted({*wide}, key=int) if ordered(errors(w, "other widths")) == len(square[0])]
    text = ", ".join(f"{f} {statistics.mean(e):.3f}" for f, e in zip(families, square, strict=True))
    text += f" (exact optima; the whole order in {ordered(square)} of {len(square[0])} trials)"
    if holding:
        text += f"; with factors of {holding[0]} columns or more the order holds in all trials"
    good = ordered(square)
    return Measured(text, HOLDS if good == len(square[0]) else IN_PART if good or holding else FAILS)


class Errors(NamedTuple):
    """The errors of `W(G, H)` in all trials, by rank: of gradient descent, and of the nearest that is known."""

    descent: dict[int, list[float]]
    nearest: dict[int, list[float]]


def errors_by_rank(target: str) -> Errors | None:
    """Returns the errors with `W(G, H)`; None if they were not measured."""
    rows = [row for row in read("approximation.csv") if row["family"] == "low_displacement_rank"]
    rows = [row for row in rows if row["target"] == target]
    if not rows:
        return None
    ranks = sorted({int(row["size"]) for row in rows})
    return Errors(
        *({rank: values(rows, column, size=str(rank)) for rank in ranks} for column in ("descent", "nearest"))
    )


def _by_rank(errors: Errors) -> str:
    descent, nearest = (
        ", ".join(f"{statistics.mean(e):.3f} ± {statistics.stdev(e):.3f} at r = {rank}" for rank, e in column.items())
        for column in errors
    )
    trials = len(next(iter(errors.descent.values())))
    return f"error of gradient descent {descent}; of the nearest known {nearest} ({trials} trials)"


def near_low_rank() -> Measured | None:
    """The ranks that near low rank targets want."""
    errors = errors_by_rank("near low rank")
    if errors is None:
        return None
    claimed = {rank: e for rank, e in errors.descent.items() if rank in (1, 2, 4)}
    best = min(claimed.values(), key=statistics.mean)
    verdicts = [at_most(0, gap(best, e)) for rank, e in errors.descent.items() if rank not in claimed]
    return Measured(_by_rank(errors), everywhere(verdicts))


def random_targets() -> Measured | None:
    """Whether the error on random targets grows anywhere with the rank."""
    errors = errors_by_rank("gaussian")
    if errors is None:
        return None
    steps = itertools.pairwise(errors.descent.values())
    return Measured(_by_rank(errors), somewhere([at_least(0, gap(larger, smaller)) for smaller, larger in steps]))


def pinwheel() -> Measured | None:
    """Losses as multiples of the dense layer's of the same seed."""
    rows, texts, good = read("pinwheel.csv"), [], []
    if not rows:
        return None
    structured = ("circulant", "symmetric_toeplitz", "toeplitz")
    for bottom in ("frozen", "trained"):
        times = {
            (column, layer): [
                one / dense
                for one, dense in zip(
                    values(rows, column, layer=layer, bottom=bottom),
                    values(rows, column, layer="dense", bottom=bottom),
                    strict=True,
                )
            ]
            for column in ("train_loss", "test_loss")
            for layer in ("lora", *structured)
        }
        seeds = list(zip(*(times["train_loss", layer] for layer in ("lora", *structured)), strict=True))
        good += [lora > 2 and max(others) < 2 for lora, *others in seeds]
        training = ", ".join(
            f"{layer} {mean_and_deviation(times['train_loss', layer])}" for layer in ("lora", *structured)
        )
        testing = f"lora {mean_and_deviation(times['test_loss', 'lora'])}"
        texts.append(
            f"bottom {bottom}: {training} times the dense layer's training loss, {testing} times its test loss"
        )
    text = f"{'; '.join(texts)}; so in {sum(good)} of {len(good)} pairs of a seed and a bottom"
    return Measured(text, share(sum(good), len(good)))
