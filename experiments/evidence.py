"""What the files of results say of each of the paper's claims: the measured numbers in words, and a verdict.

Where a claim compares means over seeds, a difference counts as far as its 95 % confidence interval is on one side of
what is claimed.
"""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import pretrain_cifar
from experiments.grid import Grid, mean_and_deviation
from experiments.rows import read_rows, read_settings
from experiments.verdicts import (
    FAILS,
    HOLDS,
    IN_PART,
    UNDECIDED,
    Gap,
    Measured,
    at_least,
    at_most,
    everywhere,
    gap,
    share,
    somewhere,
    together,
)

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "results"
STRUCTURED = ("circulant", "toeplitz", "kronecker")
SEEDS = 3

Row = dict[str, str]


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


def cell_of(rows: Sequence[Row], task: str, method: str) -> Grid:
    """Returns the grid of one cell. A grid may search with one task for all."""
    searched = dict.fromkeys(row["task"] for row in rows if (row["method"], row["part"]) == (method, "search"))
    return Grid((task,), {method: ()}, (), "" if task in searched else next(iter(searched), ""))


def final_scores(name: str, task: str, method: str) -> list[float]:
    """Returns the scores of a cell of a grid in percent, with the rate that its search chose; none if unfinished.

    NaN is the score of a run that diverged.
    """
    rows = read_rows(RESULTS / name)
    scores = cell_of(rows, task, method).scores(rows, task, method)
    return scores if len(scores) >= SEEDS else []


def trained(name: str, task: str, method: str) -> int:
    """Returns how many numbers a method trains beside the head, which is what a linear probe trains."""
    rows = [row for row in read_rows(RESULTS / name) if row["task"] == task]
    count, head = (cell_of(rows, task, one).trained(rows, one) for one in (method, "linear_probe"))
    return count - head


# What the page calls a model that has no name.
NAMES = {str(pretrain_cifar.MODEL): "ViT of 2.7 M parameters pretrained on five classes of CIFAR-10"}


def _on(name: str) -> str:
    """Says what a grid on images was measured on."""
    settings = read_settings(RESULTS / name)
    classes = f" of the classes {', '.join(settings['classes'])}" if settings["classes"] else ""
    model = f"{NAMES.get(settings['model'], settings['model'])} {settings['variant']}".rstrip()
    return f"{model}; {settings['about']}{classes}; {settings['steps']:,} steps of {settings['batch_size']}"


def _tasks(name: str) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in read_rows(RESULTS / name) if row["part"] == "final"))


# Tables of images of which the page makes another use.
VTAB, LARGE = "image_table_vtab.csv", "image_table_large.csv"


def images() -> Measured | None:
    """The lead over LoRA on images, in all tables that there are."""
    texts, verdicts, on = [], [], []
    names = sorted(path.name for path in RESULTS.glob("image_table_*.csv") if path.name not in (VTAB, LARGE))
    for name, task in [(table, column) for table in names for column in _tasks(table)]:
        cells = {m: final_scores(name, task, m) for m in ("lora", *STRUCTURED, "circulant_adapter", "full")}
        cells = {m: scores for m, scores in cells.items() if scores}
        if not cells.keys() >= {"lora", *STRUCTURED}:
            continue
        leads = {m: gap(cells[m], cells["lora"]) for m in STRUCTURED}
        verdicts += [at_least(5, lead) for lead in leads.values()]
        texts.append(f"{task}: {_cells(cells)}; over LoRA {', '.join(f'{m} {lead}' for m, lead in leads.items())}")
        on.append(_on(name))
    return Measured("; ".join(texts), somewhere(verdicts), "; ".join(dict.fromkeys(on))) if texts else None


def low_data() -> Measured | None:
    """The share of the data with which circulants come near full fine-tuning on all of it."""
    texts, verdicts, on = [], [], []
    for name in sorted(path.name for path in RESULTS.glob("low_data_*.csv")):
        tasks = sorted(_tasks(name), key=lambda task: float(task[:-1]))
        cells = {task: [final_scores(name, task, method) for method in ("circulant", "full")] for task in tasks}
        cells = {task: pair for task, pair in cells.items() if all(pair)}
        if not cells.keys() >= {"2%", "20%", "100%"}:
            continue
        below = {task: gap(cells["100%"][1], cells[task][0]) for task in ("2%", "20%")}
        at_two, at_twenty = (at_most(1, found) for found in below.values())
        verdict = at_two if at_two != FAILS else IN_PART if at_twenty == HOLDS else at_twenty
        means = (f"{' and '.join(map(mean_and_deviation, pair))} with {task}" for task, pair in cells.items())
        behind = ", ".join(f"with {task} {found}" for task, found in below.items())
        text = f"circulant and full: {', '.join(means)}; full with 100% is above circulants {behind}"
        probe = final_scores(name, "100%", "linear_probe")
        if probe and statistics.mean(cells["100%"][1]) <= statistics.mean(probe):
            verdict = UNDECIDED
            text += f", and not above a linear probe ({mean_and_deviation(probe)}): too few steps for a yardstick"
        verdicts.append(verdict)
        texts.append(text)
        on.append(_on(name))
    if not texts:
        return None
    return Measured("; ".join(texts), together(verdicts), "; ".join(on))


def vtab() -> Measured | None:
    """On how many sets of VTAB-1k circulants are among the two best methods of those that were measured."""
    places = []
    for task in _tasks(VTAB):
        cells = {m: final_scores(VTAB, task, m) for m in dict.fromkeys(r["method"] for r in read_rows(RESULTS / VTAB))}
        means = {m: statistics.mean(scores) for m, scores in cells.items() if scores}
        if "circulant" in means and len(means) > 2:
            places.append(sum(mean > means["circulant"] for mean in means.values()) + 1)
    if not places:
        return None
    good = sum(place <= 2 for place in places)
    text = f"in the top 2 on {good} of {len(places)} sets; its places: {', '.join(map(str, places))}"
    return Measured(text, HOLDS if good >= 10 else IN_PART if good else FAILS, _on(VTAB))


def large() -> Measured | None:
    """How far circulants are below full fine-tuning on large sets."""
    texts, verdicts = [], []
    for task in _tasks(LARGE):
        cells = {m: final_scores(LARGE, task, m) for m in ("full", "circulant")}
        if all(cells.values()):
            below = gap(*cells.values())
            verdicts.append(at_most(1, below))
            texts.append(f"{task}: {_cells(cells)}; full is above by {below}")
    if not texts:
        return None
    return Measured("; ".join(texts), together(verdicts), _on(LARGE))


GLUE = ("stsb", "mrpc", "cola", "rte")


def glue_cells(*methods: str) -> dict[str, dict[str, list[float]]] | None:
    """Returns the scores by method and task; None while one is missing."""
    cells = {m: {task: final_scores("glue_minilm.csv", task, m) for task in GLUE} for m in methods}
    return cells if all(all(found.values()) for found in cells.values()) else None


def glue_model() -> str:
    """Says what GLUE was measured with."""
    return f"{read_settings(RESULTS / 'glue_minilm.csv')['model']}, validation sets"


def blind(method: str) -> list[str]:
    """Returns the tasks of GLUE on which all learning rates of a method gave the same score: nothing was chosen."""
    rows, found = read_rows(RESULTS / "glue_minilm.csv"), []
    for task in GLUE:
        cell = (task, method, "search")
        scores = [row["score"] for row in rows if (row["task"], row["method"], row["part"]) == cell]
        if len(scores) > 1 and len({*scores}) == 1:
            found.append(task)
    return found


def _seed_means(cell: Mapping[str, list[float]], without: Sequence[str] = ()) -> list[float]:
    """The mean over tasks for each seed."""
    return [statistics.mean(scores) for scores in zip(*(cell[t] for t in cell if t not in without), strict=True)]


def glue_adapters() -> Measured | None:
    """Circulant adapters beside bottleneck adapters, with and without the tasks on which a search found nothing."""
    cells = glue_cells("circulant_adapter", "bottleneck")
    if cells is None or glue_cells("linear_probe") is None:
        return None
    counts = {m: trained("glue_minilm.csv", GLUE[0], m) for m in cells}
    ratio = counts["bottleneck"] / counts["circulant_adapter"]
    less = gap(_seed_means(cells["bottleneck"]), _seed_means(cells["circulant_adapter"]))
    text = "; ".join(f"{m} {_cells(found)}, {counts[m]:,} numbers beside the head" for m, found in cells.items())
    text += f": {ratio:.0f} x fewer; the bottleneck is above by {less} on average"
    verdicts = {at_most(1, less)}
    if flat := [task for task in GLUE if any(task in blind(m) for m in cells)]:
        seeing = gap(_seed_means(cells["bottleneck"], flat), _seed_means(cells["circulant_adapter"], flat))
        verdicts.add(at_most(1, seeing))
        text += f", by {seeing} without {' and '.join(flat)}, where a search gave the same score for every rate"
    verdict = UNDECIDED if len(verdicts) > 1 else verdicts.pop()
    return Measured(text, verdict if ratio >= 12 else FAILS, glue_model())


def glue_best() -> Measured | None:
    """Which structured update is best on GLUE."""
    cells = glue_cells(*STRUCTURED, "lora")
    if cells is None:
        return None
    means = {m: _seed_means(found) for m, found in cells.items()}
    text = "; ".join(f"{m} {_cells(found)}, mean {mean_and_deviation(means[m])}" for m, found in cells.items())
    leads = {m: gap(means["circulant"], means[m]) for m in STRUCTURED if m != "circulant"}
    text += f"; circulant is above {', '.join(f'{m} by {lead}' for m, lead in leads.items())}"
    verdicts = [at_least(0, lead) for lead in leads.values()]
    return Measured(text, everywhere(verdicts), glue_model())


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
    found = gap(*cells.values())
    return Measured(f"{_cells(cells)}; {found} by K", at_most(1, Gap(abs(found.difference), found.error)))


def adapter_bias() -> Measured | None:
    """Adapters with and without a bias."""
    families = ("circulant", "toeplitz", "kronecker")
    cells = _ablation(*(f"{family}{end}" for family in families for end in ("", ", no bias")))
    if cells is None:
        return None
    gains = {f: gap(cells[f], cells[f"{f}, no bias"]) for f in families}
    text = ", ".join(f"{family} {gain}" for family, gain in gains.items())
    text += f" points by the bias ({_cells(cells)})"
    verdict = everywhere([at_least(0, gain) for gain in gains.values()])
    if verdict != HOLDS:
        return Measured(text, verdict)
    most = sum(gains["kronecker"])
    least = all(most <= gain.difference - gain.error for f, gain in gains.items() if f != "kronecker")
    return Measured(text, HOLDS if least else IN_PART)


# The files of the analyses, and what the updates are called there.
ANALYSES = {
    "circulant": ("analysis_digits.csv", "Circulant"),
    "toeplitz": ("analysis_digits_toeplitz.csv", "SymmetricToeplitzPair"),
    "kronecker": ("analysis_digits_kronecker.csv", "Kronecker"),
}


def ranks() -> Measured | None:
    """Whether the updates that were learned have the largest rank that they can, and how well conditioned they are."""
    texts, good = [], []
    for method, (name, family) in ANALYSES.items():
        rows = [row for row in read(name) if row["family"] == family]
        if not rows:
            return None
        full = [row["rank"] == row["largest_rank"] for row in rows]
        conditions = values(rows, "condition")
        texts.append(
            f"{method}: {sum(full)} of {len(full)} updates have the largest rank, condition {min(conditions):,.0f} to"
            f" {max(conditions):,.0f}"
        )
        good.append(all(full))
    return Measured("; ".join(texts), share(sum(good), len(good)))


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
