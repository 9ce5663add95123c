"""What the files of results say of each of the paper's claims: the measured numbers in words, and a verdict."""

import csv
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.grid import mean_and_deviation

RESULTS = Path(__file__).parent / "results"
STEP = Path(__file__).parent.parent / "benchmarks" / "results" / "step.json"
HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
STRUCTURED = ("circulant", "toeplitz", "kronecker")

Row = dict[str, str]


class Measured(NamedTuple):
    """What came out, in words with numbers, and the verdict."""

    text: str
    verdict: str


def read(name: str) -> list[Row]:
    """Returns the rows of a file of results; none if it is not there."""
    path = RESULTS / name
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def values(rows: Sequence[Row], column: str, **where: str) -> list[float]:
    """Returns the numbers of a column in the rows whose other columns have these values.

    >>> values([{"family": "a", "error": "0.5"}, {"family": "b", "error": "0.1"}], "error", family="a")
    [0.5]
    """
    return [float(row[column]) for row in rows if all(row[key] == value for key, value in where.items())]


def final_scores(name: str, task: str, method: str, seeds: int = 3) -> list[float]:
    """Returns the scores of a cell of a grid in percent, with the rate that its search chose; none if unfinished."""
    rows = [row for row in read(name) if row["method"] == method]
    search = [row for row in rows if row["part"] == "search"]
    # A grid may search with one task for all.
    search = [row for row in search if row["task"] == task] or search
    if not search:
        return []
    best = max(search, key=lambda row: (float(row["score"]), -float(row["loss"])))["learning_rate"]
    scores = [100 * score for score in values(rows, "score", task=task, part="final", learning_rate=best)]
    return scores if len(scores) == seeds else []


def trained(name: str, method: str) -> int:
    """Returns how many numbers a method trains, the largest head included."""
    return max(int(row["trainable"]) for row in read(name) if row["method"] == method)


def share(good: int, of: int) -> str:
    """Returns the verdict for a claim that is true in so many of all cases.

    >>> share(3, 3), share(1, 3), share(0, 3)
    ('holds', 'holds in part', 'does not hold')
    """
    return HOLDS if good == of else IN_PART if good else FAILS


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


def errors_by_rank(target: str) -> dict[int, float]:
    """Returns the mean error of gradient descent with `W(G, H)` by its rank."""
    rows = [row for row in read("approximation.csv") if row["family"] == "low_displacement_rank"]
    ranks = sorted({int(row["size"]) for row in rows})
    return {rank: statistics.mean(values(rows, "descent", target=target, size=str(rank))) for rank in ranks}


def near_low_rank() -> Measured | None:
    """The ranks that near low rank targets want."""
    errors = errors_by_rank("near low rank")
    if not errors:
        return None
    best = min(errors, key=errors.get)
    return Measured(_by_rank(errors), HOLDS if best in (1, 2, 4) else FAILS)


def random_targets() -> Measured | None:
    """Whether the error on random targets grows anywhere with the rank."""
    errors = errors_by_rank("gaussian")
    if not errors:
        return None
    monotone = list(errors.values()) == sorted(errors.values(), reverse=True)
    return Measured(_by_rank(errors), FAILS if monotone else HOLDS)


def _by_rank(errors: dict[int, float]) -> str:
    return "error " + ", ".join(f"{error:.3f} at r = {rank}" for rank, error in errors.items()) + " (10 trials)"


def pinwheel() -> Measured | None:
    """Training losses as multiples of the dense layer's."""
    rows, texts, good = read("pinwheel.csv"), [], 0
    if not rows:
        return None
    for bottom in ("frozen", "trained"):
        loss = {
            layer: statistics.mean(values(rows, "train_loss", layer=layer, bottom=bottom))
            for layer in ("dense", "lora", "circulant", "symmetric_toeplitz", "toeplitz")
        }
        ratio = {layer: value / loss["dense"] for layer, value in loss.items() if layer != "dense"}
        texts.append(f"bottom {bottom}: " + ", ".join(f"{layer} {times:.1f} x" for layer, times in ratio.items()))
        low = ratio.pop("lora")
        good += low > 2 and max(ratio.values()) < 2
    return Measured("; ".join(texts) + " the dense layer's training loss (5 seeds)", share(good, 2))


def images() -> Measured | None:
    """The lead over LoRA on images."""
    name, task = "image_table_cifar.csv", "cifar10"
    cells = {method: final_scores(name, task, method) for method in ("lora", *STRUCTURED, "circulant_adapter", "full")}
    if not all(cells.values()):
        return None
    lead = {m: statistics.mean(cells[m]) - statistics.mean(cells["lora"]) for m in STRUCTURED}
    best = max(lead, key=lead.get)
    return Measured(_cells(cells) + f"; {best} {lead[best]:+.1f} over LoRA", HOLDS if lead[best] >= 5 else FAILS)


def low_data() -> Measured | None:
    """The share of the data with which a structured update reaches full fine-tuning on all of it."""
    name = "low_data_cifar.csv"
    rows = read(name)
    goal = final_scores(name, "100%", "full")
    methods = [*STRUCTURED, "circulant_adapter"]
    tasks = sorted({row["task"] for row in rows if row["part"] == "final"}, key=lambda task: float(task[:-1]))
    cells = {task: {m: final_scores(name, task, m) for m in methods} for task in tasks}
    if not goal or not all(all(by_method.values()) for by_method in cells.values()):
        return None
    best = {task: max(map(statistics.mean, by_method.values())) for task, by_method in cells.items()}
    reached = [task for task in tasks if best[task] >= statistics.mean(goal)]
    text = ", ".join(f"{value:.1f} at {task}" for task, value in best.items())
    text += f" (the best structured method); full on all data {mean_and_deviation(goal)}"
    first = float(reached[0][:-1]) if reached else math.inf
    return Measured(text, HOLDS if first <= 2 else IN_PART if first < 100 else FAILS)


GLUE = ("stsb", "mrpc", "cola", "rte")


def glue_means(*methods: str) -> dict[str, list[float]] | None:
    """Returns for each method its mean on every task; None while one is missing."""
    cells = {m: [final_scores("glue_minilm.csv", task, m) for task in GLUE] for m in methods}
    if not all(all(found) for found in cells.values()):
        return None
    return {m: [statistics.mean(cell) for cell in found] for m, found in cells.items()}


def glue_adapters() -> Measured | None:
    """Circulant adapters beside bottleneck adapters."""
    means = glue_means("circulant_adapter", "bottleneck")
    if means is None:
        return None
    counts = {m: trained("glue_minilm.csv", m) for m in means}
    gap = statistics.mean(means["bottleneck"]) - statistics.mean(means["circulant_adapter"])
    text = "; ".join(f"{m} {_tasks(found)}, {counts[m]:,} numbers" for m, found in means.items())
    ratio = counts["bottleneck"] / counts["circulant_adapter"]
    return Measured(
        f"{text}: {ratio:.0f} x fewer, {-gap:+.1f} on average", HOLDS if gap <= 1 and ratio >= 12 else FAILS
    )


def glue_best() -> Measured | None:
    """Which structured update is best on GLUE."""
    means = glue_means(*STRUCTURED, "lora")
    if means is None:
        return None
    text = "; ".join(f"{m} {_tasks(found)}, mean {statistics.mean(found):.1f}" for m, found in means.items())
    best = max(STRUCTURED, key=lambda m: statistics.mean(means[m]))
    return Measured(text, HOLDS if best == "circulant" else FAILS)


def _tasks(found: Sequence[float]) -> str:
    return ", ".join(f"{task} {value:.1f}" for task, value in zip(GLUE, found, strict=True))


def _cells(cells: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {mean_and_deviation(found)}" for name, found in cells.items())


def _ablation(*names: str) -> dict[str, list[float]] | None:
    cells = {name: final_scores("ablations_digits.csv", "digits", name) for name in names}
    return cells if all(cells.values()) else None


def without_keys() -> Measured | None:
    """Q and V against Q, K and V."""
    cells = _ablation("circulant, Q K V", "circulant, Q V")
    if cells is None:
        return None
    three, two = map(statistics.mean, cells.values())
    return Measured(_cells(cells), HOLDS if abs(three - two) <= 1 else FAILS)


def adapter_bias() -> Measured | None:
    """Adapters with and without a bias."""
    families = ("circulant", "toeplitz", "kronecker")
    cells = _ablation(*(f"{family}{end}" for family in families for end in ("", ", no bias")))
    if cells is None:
        return None
    gains = {f: statistics.mean(cells[f]) - statistics.mean(cells[f"{f}, no bias"]) for f in families}
    text = ", ".join(f"{family} {gain:+.1f}" for family, gain in gains.items()) + " points by the bias"
    good = (min(gains.values()) > 0) + (min(gains, key=gains.get) == "kronecker")
    return Measured(f"{text} ({_cells(cells)})", share(good, 2))


def ranks() -> Measured | None:
    """Whether the updates that were learned have full rank."""
    rows = read("analysis_digits.csv")
    if not rows:
        return None
    full = [int(row["rank"]) == min(int(row["rows"]), int(row["columns"])) for row in rows]
    family = rows[0]["family"].lower()
    return Measured(f"{family}: {sum(full)} of {len(full)} updates have full rank", share(sum(full), len(full)))


def toeplitz_time() -> Measured | None:
    """The time of a training step with Toeplitz pairs."""
    if not STEP.is_file():
        return None
    rows = {row["method"]: row for row in json.loads(STEP.read_text())}
    ratio = rows["toeplitz"]["ms"] / rows["circulant"]["ms"]
    extra = (rows["toeplitz"]["ms"] - rows["frozen"]["ms"]) / rows["frozen"]["ms"]
    text = f"a whole step of {rows['circulant']['model']} takes {ratio:.2f} x the circulant's; {extra:+.0%} over frozen"
    return Measured(text, HOLDS if ratio >= 1.8 else FAILS)


def counted() -> Measured | None:
    """The numbers of circulants on Q, K and V of ViT-B."""
    if not STEP.is_file():
        return None
    rows = {row["method"]: row for row in json.loads(STEP.read_text())}
    head = 768 * 100 + 100
    count = rows["circulant"]["parameters"] - head
    whole = rows["full"]["parameters"] - head
    return Measured(f"{count:,} of {whole:,}, {count / whole:.2%}", HOLDS if round(count, -3) == 55_000 else FAILS)


def nothing() -> None:
    """What is not measured here."""
