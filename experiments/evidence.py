"""What the files of results say of each of the paper's claims: the measured numbers in words, and a verdict.

Where a claim compares means over seeds, a difference counts if it is larger than twice its standard error.
"""

import csv
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.grid import Grid, mean_and_deviation
from experiments.rows import read_rows, read_settings

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "results"
HOLDS, IN_PART, FAILS, UNDECIDED = "holds", "holds in part", "does not hold", "undecided"
VERDICTS = (HOLDS, IN_PART, FAILS, UNDECIDED)
STRUCTURED = ("circulant", "toeplitz", "kronecker")
SEEDS = 3

Row = dict[str, str]


class Measured(NamedTuple):
    """What came out, in words with numbers, the verdict, and what it was measured on if the files say that."""

    text: str
    verdict: str
    on: str = ""


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


def final_scores(name: str, task: str, method: str) -> list[float]:
    """Returns the scores of a cell of a grid in percent, with the rate that its search chose; none if unfinished."""
    rows = read_rows(RESULTS / name)
    searched = dict.fromkeys(row["task"] for row in rows if (row["method"], row["part"]) == (method, "search"))
    # A grid may search with one task for all.
    cell = Grid((task,), {method: ()}, (), "" if task in searched else next(iter(searched), ""))
    scores = cell.scores(rows, task, method)
    return scores if len(scores) >= SEEDS and all(map(math.isfinite, scores)) else []


def trained(name: str, task: str, method: str) -> int:
    """Returns how many numbers a method trains beside the head, which is what a linear probe trains."""
    rows = [row for row in read_rows(RESULTS / name) if row["task"] == task]
    count = {row["method"]: row["trainable"] for row in rows}
    return count[method] - count["linear_probe"]


def gap(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Returns the difference of two means, and twice its standard error.

    >>> gap([3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
    (3.0, 1.1547005383792517)
    """
    error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in (first, second)))
    return statistics.mean(first) - statistics.mean(second), 2 * error


def at_most(limit: float, difference: float, error: float) -> str:
    """Returns the verdict for a claim that a difference, known to within an error, is at most so much.

    >>> at_most(1.0, 0.5, 2.0), at_most(1.0, 2.5, 2.0), at_most(1.0, 2.5, 0.2)
    ('holds', 'undecided', 'does not hold')
    """
    return HOLDS if difference <= limit else UNDECIDED if difference - error <= limit else FAILS


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


class Errors(NamedTuple):
    """Mean and deviation of the errors of `W(G, H)` by rank, over so many trials."""

    descent: dict[int, str]
    nearest: dict[int, str]
    means: dict[int, float]
    trials: int


def errors_by_rank(target: str) -> Errors | None:
    """Returns the errors with `W(G, H)`; None if they were not measured."""
    rows = [row for row in read("approximation.csv") if row["family"] == "low_displacement_rank"]
    rows = [row for row in rows if row["target"] == target]
    if not rows:
        return None
    ranks = sorted({int(row["size"]) for row in rows})
    found = {
        column: {rank: values(rows, column, size=str(rank)) for rank in ranks} for column in ("descent", "nearest")
    }
    words = {
        column: {r: f"{statistics.mean(e):.3f} ± {statistics.stdev(e):.3f}" for r, e in errors.items()}
        for column, errors in found.items()
    }
    means = {rank: statistics.mean(errors) for rank, errors in found["descent"].items()}
    return Errors(words["descent"], words["nearest"], means, len(found["descent"][ranks[0]]))


def _by_rank(errors: Errors) -> str:
    descent, nearest = (
        ", ".join(f"{error} at r = {rank}" for rank, error in column.items())
        for column in (errors.descent, errors.nearest)
    )
    return f"error of gradient descent {descent}; of the nearest known {nearest} ({errors.trials} trials)"


def near_low_rank() -> Measured | None:
    """The ranks that near low rank targets want."""
    errors = errors_by_rank("near low rank")
    if errors is None:
        return None
    best = min(errors.means, key=errors.means.get)
    return Measured(_by_rank(errors), HOLDS if best in (1, 2, 4) else FAILS)


def random_targets() -> Measured | None:
    """Whether the error on random targets grows anywhere with the rank."""
    errors = errors_by_rank("gaussian")
    if errors is None:
        return None
    monotone = list(errors.means.values()) == sorted(errors.means.values(), reverse=True)
    return Measured(_by_rank(errors), FAILS if monotone else HOLDS)


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


def _on(name: str) -> str:
    """Says what a grid on images was measured on."""
    settings = read_settings(RESULTS / name)
    classes = f" of the classes {', '.join(settings['classes'])}" if settings["classes"] else ""
    model = f"{settings['model']} {settings['variant']}".rstrip()
    return f"{model}; {settings['about']}{classes}; {settings['steps']:,} steps of {settings['batch_size']}"


def images() -> Measured | None:
    """The lead over LoRA on images."""
    name = "image_table_cifar.csv"
    tasks = dict.fromkeys(row["task"] for row in read_rows(RESULTS / name))
    texts, leads = [], []
    for task in tasks:
        cells = {m: final_scores(name, task, m) for m in ("lora", *STRUCTURED, "circulant_adapter", "full")}
        if not all(cells.values()):
            return None
        lead = {m: gap(cells[m], cells["lora"]) for m in STRUCTURED}
        best = max(lead, key=lambda method: lead[method][0])
        leads.append(lead[best][0])
        texts.append(f"{task}: {_cells(cells)}; {best} {lead[best][0]:+.1f} ± {lead[best][1]:.1f} over LoRA")
    if not leads:
        return None
    return Measured("; ".join(texts), HOLDS if max(leads) >= 5 else FAILS, _on(name))


def low_data() -> Measured | None:
    """The share of the data with which circulants reach full fine-tuning on all of it."""
    name = "low_data_cifar.csv"
    tasks = {row["task"] for row in read_rows(RESULTS / name) if row["part"] == "final"}
    cells = {
        task: [final_scores(name, task, method) for method in ("circulant", "full")]
        for task in sorted(tasks, key=lambda task: float(task[:-1]))
    }
    if not cells or not all(all(pair) for pair in cells.values()) or "100%" not in cells:
        return None
    goal = statistics.mean(cells["100%"][1])
    reached = [float(task[:-1]) for task, (circulant, _) in cells.items() if statistics.mean(circulant) >= goal]
    texts = (f"{' and '.join(map(mean_and_deviation, pair))} with {task}" for task, pair in cells.items())
    first = min(reached, default=math.inf)
    verdict = HOLDS if first <= 2 else IN_PART if first <= 20 else FAILS
    return Measured(f"circulant and full: {', '.join(texts)}", verdict, _on(name))


GLUE = ("stsb", "mrpc", "cola", "rte")


def glue_cells(*methods: str) -> dict[str, dict[str, list[float]]] | None:
    """Returns the scores by method and task; None while one is missing."""
    cells = {m: {task: final_scores("glue_minilm.csv", task, m) for task in GLUE} for m in methods}
    return cells if all(all(found.values()) for found in cells.values()) else None


def _seed_means(cell: Mapping[str, list[float]]) -> list[float]:
    """The mean over tasks for each seed."""
    return [statistics.mean(scores) for scores in zip(*cell.values(), strict=True)]


def glue_adapters() -> Measured | None:
    """Circulant adapters beside bottleneck adapters."""
    cells = glue_cells("circulant_adapter", "bottleneck")
    if cells is None:
        return None
    counts = {m: trained("glue_minilm.csv", GLUE[0], m) for m in cells}
    less, error = gap(_seed_means(cells["bottleneck"]), _seed_means(cells["circulant_adapter"]))
    text = "; ".join(f"{m} {_cells(found)}, {counts[m]:,} numbers beside the head" for m, found in cells.items())
    ratio = counts["bottleneck"] / counts["circulant_adapter"]
    text += f": {ratio:.0f} x fewer, {-less:+.1f} ± {error:.1f} on average"
    return Measured(text, at_most(1, less, error) if ratio >= 12 else FAILS)


def glue_best() -> Measured | None:
    """Which structured update is best on GLUE."""
    cells = glue_cells(*STRUCTURED, "lora")
    if cells is None:
        return None
    means = {m: _seed_means(found) for m, found in cells.items()}
    text = "; ".join(f"{m} {_cells(found)}, mean {mean_and_deviation(means[m])}" for m, found in cells.items())
    leads = [gap(means["circulant"], means[other]) for other in STRUCTURED if other != "circulant"]
    if all(lead > error for lead, error in leads):
        return Measured(text, HOLDS)
    return Measured(text, FAILS if any(lead < -error for lead, error in leads) else UNDECIDED)


def _cells(cells: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{name} {mean_and_deviation(found)}" for name, found in cells.items())


def _ablation(*names: str) -> dict[str, list[float]] | None:
    cells = {name: final_scores("ablations_digits.csv", "digits", name) for name in names}
    return cells if all(cells.values()) else None


def without_keys() -> Measured | None:
    """Q and V against Q, K and V."""
    cells = _ablation("circulant, Q K V", "circulant, Q V")
    if cells is None:
        return None
    difference, error = gap(*cells.values())
    return Measured(f"{_cells(cells)}; {difference:+.1f} ± {error:.1f} by K", at_most(1, abs(difference), error))


def adapter_bias() -> Measured | None:
    """Adapters with and without a bias."""
    families = ("circulant", "toeplitz", "kronecker")
    cells = _ablation(*(f"{family}{end}" for family in families for end in ("", ", no bias")))
    if cells is None:
        return None
    gains = {f: gap(cells[f], cells[f"{f}, no bias"]) for f in families}
    text = ", ".join(f"{family} {gain:+.1f} ± {error:.1f}" for family, (gain, error) in gains.items())
    text += f" points by the bias ({_cells(cells)})"
    if any(gain < -error for gain, error in gains.values()):
        return Measured(text, FAILS)
    if any(gain <= error for gain, error in gains.values()):
        return Measured(text, UNDECIDED)
    return Measured(text, HOLDS if min(gains, key=gains.get) == "kronecker" else IN_PART)


def ranks() -> Measured | None:
    """Whether the updates that were learned have full rank, and how well conditioned they are."""
    names = {"circulant": "analysis_digits.csv"}
    names |= {method: f"analysis_digits_{method}.csv" for method in ("toeplitz", "kronecker")}
    texts, good = [], []
    for method, name in names.items():
        if not (rows := read(name)):
            continue
        full = [int(row["rank"]) == min(int(row["rows"]), int(row["columns"])) for row in rows]
        conditions = values(rows, "condition")
        texts.append(
            f"{method}: {sum(full)} of {len(full)} updates have full rank, condition {min(conditions):,.0f} to"
            f" {max(conditions):,.0f}"
        )
        good.append(all(full))
    return Measured("; ".join(texts), share(sum(good), len(names))) if texts else None


def toeplitz_time() -> Measured | None:
    """The time of a layer, and of a whole training step, with Toeplitz pairs and with circulant pairs."""
    if not all((BENCHMARKS / name).is_file() for name in ("structured.json", "step.json")):
        return None
    layers = [row for row in json.loads((BENCHMARKS / "structured.json").read_text()) if row["execution"] == "auto"]
    time = {
        (row["family"], row["tokens"]): row["ms"] for row in layers if row["width"] == 768 and row["dtype"] == "float32"
    }
    lengths = sorted(tokens for family, tokens in time if family == "circulant_pair")
    times = {n: time["symmetric_toeplitz_pair", n] / time["circulant_pair", n] for n in lengths}
    steps = {row["method"]: row for row in json.loads((BENCHMARKS / "step.json").read_text())}
    text = ", ".join(f"{ratio:.1f} x with {tokens:,} tokens" for tokens, ratio in times.items())
    text = f"a layer of width 768 with its update takes {text} of a circulant's; a whole step of"
    text += f" {steps['circulant']['model']} {steps['toeplitz']['ms'] / steps['circulant']['ms']:.2f} x"
    return Measured(text, share(sum(ratio >= 1.8 for ratio in times.values()), len(times)))


def counted() -> Measured | None:
    """The numbers of circulants on Q, K and V of ViT-B."""
    path = BENCHMARKS / "step.json"
    if not path.is_file():
        return None
    rows = {row["method"]: row for row in json.loads(path.read_text())}
    head = 768 * 100 + 100
    count = rows["circulant"]["parameters"] - head
    whole = rows["full"]["parameters"] - head
    return Measured(f"{count:,} of {whole:,}, {count / whole:.2%}", HOLDS if round(count, -3) == 55_000 else FAILS)


def nothing() -> None:
    """What is not measured here."""
