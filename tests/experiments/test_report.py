"""The report says what the files say, and nothing where they are missing."""

import csv
import json
import re

import numpy as np
import pytest
import scipy.stats

from experiments import evidence, matrix_evidence, report, verdicts
from experiments.rows import COLUMNS

GRID = dict.fromkeys(COLUMNS, "") | {"metric": "accuracy", "loss": "1.0", "steps": "1", "seconds": "1"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "BENCHMARKS", tmp_path)
    return tmp_path


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def cell(task, method, scores, rate="0.1", trainable=100, search_score=0.5):
    search = GRID | {"task": task, "method": method, "part": "search", "learning_rate": rate, "seed": "10"}
    rows = [search | {"score": search_score, "trainable": trainable}]
    for seed, score in enumerate(scores):
        rows.append(search | {"part": "final", "seed": seed, "score": score, "trainable": trainable})
    return rows


def test_nothing_is_measured_without_files(results):
    text = report.page(report.CLAIMS)
    assert text.count("**not measured here**") == len(report.CLAIMS)
    assert "holds: 0, holds in part: 0, does not hold: 0, undecided: 0, not measured here: 18" in text
    # No number of ours: what is measured is empty in every row.
    rows = [line for line in text.splitlines() if "**not measured here**" in line]
    assert all(line.split(" | ")[1].strip() == "" for line in rows)


def glue(**cells):
    """The rows of all four tasks, with these scores of every method on each."""
    counts = {"linear_probe": 10, "bottleneck": 1210}
    return [
        row
        for task in evidence.GLUE
        for method, scores in cells.items()
        for row in cell(task, method, scores, trainable=counts.get(method, 110))
    ]


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([0.795, 0.795, 0.795], verdicts.HOLDS),
        ([0.75, 0.75, 0.75], verdicts.FAILS),
        ([0.70, 0.80, 0.84], verdicts.UNDECIDED),
    ],
)
def test_adapters_on_glue(results, scores, verdict):
    (results / "glue_minilm.json").write_text('{"model": "m"}')
    rows = glue(linear_probe=[0.5] * 3, bottleneck=[0.8, 0.8, 0.8], circulant_adapter=scores)
    write(results / "glue_minilm.csv", rows)
    found = evidence.glue_adapters()
    assert found.verdict == verdict
    # Beside the head, which the probe trains.
    assert f"12 x fewer; the bottleneck is above by {100 * (0.8 - sum(scores) / 3):+.1f} ± " in found.text
    assert found.on == "m, validation sets"
    # While a single seed is missing there is no verdict; where one has diverged none can be given.
    write(results / "glue_minilm.csv", rows[:-1])
    assert evidence.glue_adapters() is None
    write(results / "glue_minilm.csv", [*rows[:-1], rows[-1] | {"score": "nan"}])
    assert evidence.glue_adapters().verdict == verdicts.UNDECIDED
    assert "1 of 3 diverged" in evidence.glue_adapters().text
    assert "above by unknown, since runs diverged" in evidence.glue_adapters().text
    # Nor without the probe, whose numbers are the head's.
    write(results / "glue_minilm.csv", [row for row in rows if row["method"] != "linear_probe"])
    assert evidence.glue_adapters() is None


def test_a_search_that_found_nothing_decides_nothing(results):
    (results / "glue_minilm.json").write_text('{"model": "m"}')
    rows = glue(linear_probe=[0.5] * 3, bottleneck=[0.8, 0.8, 0.8], circulant_adapter=[0.795, 0.795, 0.795])
    for row in rows:
        if (row["task"], row["method"], row["part"]) == ("cola", "circulant_adapter", "final"):
            row["score"] = 0.1
    write(results / "glue_minilm.csv", rows)
    assert evidence.glue_adapters().verdict == verdicts.FAILS
    # Four more rates on CoLA, as many as a search may try, with one score for all.
    search = next(r for r in rows if (r["task"], r["method"]) == ("cola", "circulant_adapter"))
    write(results / "glue_minilm.csv", [*rows, *(search | {"learning_rate": rate} for rate in (0.2, 0.3, 0.4, 0.5))])
    found = evidence.glue_adapters()
    assert found.verdict == verdicts.UNDECIDED
    assert "by +0.5 ± 0.0 without cola, where a search gave the same score for every rate" in found.text


@pytest.mark.parametrize(
    ("circulant", "kronecker", "verdict"),
    [
        ([0.80, 0.81, 0.82], [0.7, 0.71, 0.72], verdicts.HOLDS),
        ([0.60, 0.61, 0.62], [0.7, 0.71, 0.72], verdicts.FAILS),
        ([0.70, 0.71, 0.73], [0.7, 0.71, 0.72], verdicts.UNDECIDED),
    ],
)
def test_the_best_update_on_glue(results, circulant, kronecker, verdict):
    (results / "glue_minilm.json").write_text('{"model": "m"}')
    cells = {"circulant": circulant, "kronecker": kronecker, "toeplitz": [0.5, 0.51, 0.52], "lora": [0.9, 0.9, 0.9]}
    write(results / "glue_minilm.csv", glue(**cells))
    assert evidence.glue_best().verdict == verdict


def test_scores_are_those_of_the_rate_that_the_search_chose(results):
    rows = cell("a", "lora", [0.1, 0.1, 0.1], rate="0.1", search_score=0.3)
    rows += cell("a", "lora", [0.7, 0.8, 0.9], rate="0.2", search_score=0.6)
    write(results / "grid.csv", rows)
    assert evidence.final_scores("grid.csv", "a", "lora") == pytest.approx([70, 80, 90])
    assert evidence.final_scores("grid.csv", "a", "circulant") == []


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [((4, 3, 2, 1), verdicts.HOLDS), ((1, 2, 3, 4), verdicts.FAILS), ((3, 4, 2, 1), verdicts.FAILS)],
)
def test_order_of_errors(results, errors, verdict):
    families = ("rank one", "Kronecker", "circulant", "Toeplitz")
    row = {"target": "unit factor rows", "width": "50", "trial": "0", "descent": ""}
    write(results / "psd.csv", [row | {"family": f, "optimum": e} for f, e in zip(families, errors, strict=True)])
    assert matrix_evidence.psd_order().verdict == verdict


def test_the_order_at_other_widths_is_a_part(results):
    families = ("rank one", "Kronecker", "circulant", "Toeplitz")
    rows = [
        {"target": target, "width": width, "family": family, "trial": "0", "descent": "", "optimum": error}
        for target, width, errors in (("unit factor rows", "50", (3, 4, 2, 1)), ("other widths", "100", (4, 3, 2, 1)))
        for family, error in zip(families, errors, strict=True)
    ]
    write(results / "psd.csv", rows)
    found = matrix_evidence.psd_order()
    assert found.verdict == verdicts.IN_PART and "of 100 columns or more the order holds" in found.text


@pytest.mark.parametrize(
    ("errors", "near", "gaussian"),
    [
        ({1: 0.5, 4: 0.1, 8: 0.2}, verdicts.HOLDS, verdicts.HOLDS),
        ({1: 0.5, 4: 0.2, 8: 0.1}, verdicts.FAILS, verdicts.FAILS),
        ({1: 0.5, 4: 0.2, 8: 0.2005}, verdicts.UNDECIDED, verdicts.UNDECIDED),
    ],
)
def test_errors_by_rank(results, errors, near, gaussian):
    rows = [
        {"target": target, "family": "low_displacement_rank", "size": rank, "trial": trial,
         "descent": error + trial / 1000, "nearest": error}
        for target in ("near low rank", "gaussian")
        for rank, error in errors.items()
        for trial in (0, 1, 2)
    ]  # fmt: skip
    write(results / "approximation.csv", rows)
    assert (matrix_evidence.near_low_rank().verdict, matrix_evidence.random_targets().verdict) == (near, gaussian)
    assert "0.501 ± 0.001 at r = 1" in matrix_evidence.near_low_rank().text
    assert matrix_evidence.near_low_rank().text.endswith("(3 trials)")


@pytest.mark.parametrize(
    ("lora", "circulant", "verdict"),
    [((3, 4), (1, 1), verdicts.HOLDS), ((3, 1), (1, 1), verdicts.IN_PART), ((3, 3), (2.5, 3), verdicts.FAILS)],
)
def test_pinwheel_seed_by_seed(results, lora, circulant, verdict):
    losses = {"dense": (1, 1), "lora": lora, "circulant": circulant, "symmetric_toeplitz": (1, 1), "toeplitz": (1, 1)}
    rows = [
        {"layer": layer, "bottom": bottom, "seed": seed, "train_loss": loss, "test_loss": 1}
        for bottom in ("frozen", "trained")
        for layer, pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    write(results / "pinwheel.csv", rows)
    assert matrix_evidence.pinwheel().verdict == verdict


SETTINGS = {"model": "m", "variant": "S/16", "classes": ["cat"], "about": "all", "steps": 300, "batch_size": 64}


def test_the_confidence_interval_is_welchs():
    one, other = [0.9, 0.95, 0.97], [0.8, 0.82, 0.9]
    found = verdicts.gap(one, other)
    # By hand: the standard error, and the quantile at Welch's degrees of freedom.
    parts = [np.var(sample, ddof=1) / 3 for sample in (one, other)]
    freedom = sum(parts) ** 2 / sum(part**2 / 2 for part in parts)
    assert found.difference == pytest.approx(np.mean(one) - np.mean(other))
    assert found.error == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts)))


@pytest.mark.parametrize(
    ("circulant", "verdict"),
    [
        ([0.55, 0.55, 0.55], verdicts.HOLDS),
        ([0.52, 0.52, 0.52], verdicts.FAILS),
        ([0.50, 0.55, 0.62], verdicts.UNDECIDED),
    ],
)
def test_the_lead_on_images(results, circulant, verdict):
    (results / "image_table_cifar.json").write_text(json.dumps(SETTINGS))
    methods = ("lora", *evidence.STRUCTURED)
    scores = {method: circulant if method == "circulant" else [0.5, 0.5, 0.5] for method in methods}
    write(results / "image_table_cifar.csv", [r for m in methods for r in cell("dtd", m, scores[m])])
    found = evidence.images()
    assert found.verdict == verdict
    assert f"over LoRA circulant {100 * (sum(circulant) / 3 - 0.5):+.1f} ± " in found.text
    assert found.on == "m S/16; all of the classes cat; 300 steps of 64"
    # Without LoRA there is nothing to be said.
    write(results / "image_table_cifar.csv", [r for m in methods[1:] for r in cell("dtd", m, scores[m])])
    assert evidence.images() is None


def test_the_places_on_vtab(results):
    (results / evidence.VTAB).with_suffix(".json").write_text(json.dumps(SETTINGS))
    scores = {"lora": 0.5, "full": 0.8}
    for sets, verdict in ((10, verdicts.HOLDS), (9, verdicts.IN_PART), (0, verdicts.FAILS)):
        rows = []
        for place in range(10):
            circulant = 0.7 if place < sets else 0.4
            for method, score in (scores | {"circulant": circulant}).items():
                rows += cell(f"set {place}", method, [score] * 3)
        write(results / evidence.VTAB, rows)
        found = evidence.vtab()
        assert found.verdict == verdict and f"in the top 2 on {sets} of 10 sets" in found.text
    # It is no evidence for another claim.
    assert evidence.images() is None


@pytest.mark.parametrize(
    ("two", "verdict"), [((0.9, 0.9), verdicts.HOLDS), ((0.9, 0.5), verdicts.IN_PART), ((0.5, 0.5), verdicts.FAILS)]
)
def test_large_sets(results, two, verdict):
    (results / evidence.LARGE).with_suffix(".json").write_text(json.dumps(SETTINGS))
    rows = [row for task, score in zip("ab", two, strict=True) for row in cell(task, "circulant", [score] * 3)]
    write(results / evidence.LARGE, rows)
    assert evidence.large() is None
    write(results / evidence.LARGE, [*rows, *(row for task in "ab" for row in cell(task, "full", [0.905] * 3))])
    assert evidence.large().verdict == verdict


@pytest.mark.parametrize(
    ("at_two", "at_twenty", "verdict"),
    [(0.895, 0.95, verdicts.HOLDS), (0.8, 0.95, verdicts.IN_PART), (0.5, 0.6, verdicts.FAILS)],
)
def test_little_data(results, at_two, at_twenty, verdict):
    (results / "low_data_cifar.json").write_text(json.dumps(SETTINGS))
    # The rate is searched with a share that does not count.
    rows = [row for method in ("circulant", "full") for row in cell("10%", method, [])]
    for task, score in {"2%": at_two, "20%": at_twenty, "100%": 0.97}.items():
        for method, scores in (("circulant", [score] * 3), ("full", [score - 0.07] * 3)):
            rows += cell(task, method, scores)[1:]
    write(results / "low_data_cifar.csv", rows)
    assert evidence.low_data().verdict == verdict
    assert f"{100 * at_two:.1f} ± 0.0 and {100 * at_two - 7:.1f} ± 0.0 with 2%" in evidence.low_data().text
    # What is no better than a linear probe is no yardstick.
    probe = [*cell("10%", "linear_probe", []), *cell("100%", "linear_probe", [0.91, 0.91, 0.91])[1:]]
    write(results / "low_data_cifar.csv", rows + probe)
    assert evidence.low_data().verdict == verdicts.UNDECIDED
    assert "not above a linear probe (91.0 ± 0.0)" in evidence.low_data().text
    # Without 2 and 20 % nothing is said.
    write(results / "low_data_cifar.csv", [row for row in rows if row["task"] != "2%"])
    assert evidence.low_data() is None


@pytest.mark.parametrize(
    ("two", "verdict"),
    [
        ([0.9, 0.9, 0.9], verdicts.HOLDS),
        ([0.8, 0.8, 0.8], verdicts.FAILS),
        ([0.6, 0.9, 0.99], verdicts.UNDECIDED),
    ],
)
def test_without_keys(results, two, verdict):
    rows = cell("digits", "circulant, Q K V", [0.9, 0.9, 0.9]) + cell("digits", "circulant, Q V", two)
    write(results / "ablations_digits.csv", rows)
    assert evidence.without_keys().verdict == verdict


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.15, 0.15, 0.05), verdicts.HOLDS),
        ((0.05, 0.1, 0.1), verdicts.IN_PART),
        ((0.1, 0.1, 0.001), verdicts.UNDECIDED),
        ((0.1, -0.1, 0.05), verdicts.FAILS),
    ],
)
def test_the_bias_of_adapters(results, gains, verdict):
    rows = []
    for family, gain in zip(("circulant", "toeplitz", "kronecker"), gains, strict=True):
        rows += cell("digits", family, [0.80 + gain, 0.81 + gain, 0.82 + gain])
        rows += cell("digits", f"{family}, no bias", [0.80, 0.81, 0.82])
    write(results / "ablations_digits.csv", rows)
    assert evidence.adapter_bias().verdict == verdict


def test_ranks(results):
    assert evidence.ranks() is None
    row = {"rows": "64", "columns": "64", "rank": "56", "largest_rank": "56", "condition": "8.5"}
    for name, family in evidence.ANALYSES.values():
        # Of two methods there is nothing yet, or something else.
        assert evidence.ranks() is None
        write(results / name, [row | {"family": "Dense"}])
        assert evidence.ranks() is None
        write(results / name, [row | {"family": family}, row | {"family": family, "condition": "120"}])
    found = evidence.ranks()
    assert found.verdict == verdicts.HOLDS
    assert "circulant: 2 of 2 updates have the largest rank, condition 8 to 120; toeplitz: 2 of 2 " in found.text
    said = []
    for name, family in evidence.ANALYSES.values():
        write(results / name, [row | {"family": family, "rank": "55"}])
        said.append(evidence.ranks().verdict)
    assert said == [verdicts.IN_PART, verdicts.IN_PART, verdicts.FAILS]


@pytest.mark.parametrize(
    ("slow", "verdict"), [((2, 2), verdicts.HOLDS), ((2, 1), verdicts.IN_PART), ((1, 1), verdicts.FAILS)]
)
def test_what_benchmarks_say(results, slow, verdict):
    layer = {"execution": "auto", "width": 768, "dtype": "float32"}
    layers = [
        layer | {"family": family, "tokens": tokens, "ms": 10 * times}
        for tokens, factor in zip((256, 1576), slow, strict=True)
        for family, times in (("circulant_pair", 1), ("symmetric_toeplitz_pair", factor))
    ]
    (results / "structured.json").write_text(json.dumps(layers))
    assert evidence.toeplitz_time() is evidence.counted() is None
    counts = {"circulant": 132_196, "toeplitz": 132_196, "full": 85_875_556}
    steps = [{"method": m, "ms": 20, "model": "ViT-B/16", "parameters": count} for m, count in counts.items()]
    (results / "step.json").write_text(json.dumps(steps))
    assert evidence.toeplitz_time().verdict == verdict
    assert evidence.counted() == ("55,296 of 85,798,656, 0.06%", verdicts.HOLDS, "")


def test_every_number_of_the_page_here_follows_from_the_files():
    """The page in the repository is the one that the files in it make."""
    assert (evidence.RESULTS / "README.md").read_text() == report.page(report.CLAIMS)


def test_links_of_the_page_lead_somewhere():
    for name in re.findall(r"\]\(([^)]+)\)", (evidence.RESULTS / "README.md").read_text()):
        assert (evidence.RESULTS / name).is_file(), name
