"""The report says what the files say, and nothing where they are missing."""

import csv
import re

import pytest

from experiments import evidence, report
from experiments.grid import COLUMNS

GRID = dict.fromkeys(COLUMNS, "") | {"metric": "accuracy", "loss": "1.0", "steps": "1", "seconds": "1"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "STEP", tmp_path / "step.json")
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
    assert "0 hold, 0 hold in part, 0 do not hold" in text
    # No number of ours: what is measured is empty in every row.
    rows = [line for line in text.splitlines() if "**not measured here**" in line]
    assert all(line.split(" | ")[1].strip() == "" for line in rows)


@pytest.mark.parametrize(("gap", "verdict"), [(0.005, evidence.HOLDS), (0.05, evidence.FAILS)])
def test_adapters_on_glue(results, gap, verdict):
    rows = []
    for task in evidence.GLUE:
        rows += cell(task, "bottleneck", [0.8, 0.8, 0.8], trainable=1200)
        rows += cell(task, "circulant_adapter", [0.8 - gap] * 3, trainable=100)
    write(results / "glue_minilm.csv", rows)
    found = evidence.glue_adapters()
    assert found.verdict == verdict
    assert f"12 x fewer, {-100 * gap:+.1f} on average" in found.text
    # While a single seed is missing there is no verdict.
    write(results / "glue_minilm.csv", rows[:-1])
    assert evidence.glue_adapters() is None


def test_scores_are_those_of_the_rate_that_the_search_chose(results):
    rows = cell("a", "lora", [0.1, 0.1, 0.1], rate="0.1", search_score=0.3)
    rows += cell("a", "lora", [0.7, 0.8, 0.9], rate="0.2", search_score=0.6)
    write(results / "grid.csv", rows)
    assert evidence.final_scores("grid.csv", "a", "lora") == pytest.approx([70, 80, 90])
    assert evidence.final_scores("grid.csv", "a", "circulant") == []


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [((4, 3, 2, 1), evidence.HOLDS), ((1, 2, 3, 4), evidence.FAILS), ((3, 4, 2, 1), evidence.FAILS)],
)
def test_order_of_errors(results, errors, verdict):
    families = ("rank one", "Kronecker", "circulant", "Toeplitz")
    row = {"target": "unit factor rows", "width": "50", "trial": "0", "descent": ""}
    write(results / "psd.csv", [row | {"family": f, "optimum": e} for f, e in zip(families, errors, strict=True)])
    assert evidence.psd_order().verdict == verdict


@pytest.mark.parametrize(
    ("at_two", "at_twenty", "verdict"),
    [(0.91, 0.95, evidence.HOLDS), (0.8, 0.95, evidence.IN_PART), (0.5, 0.6, evidence.FAILS)],
)
def test_little_data(results, at_two, at_twenty, verdict):
    rows = cell("100%", "full", [0.9, 0.9, 0.9])
    for method in (*evidence.STRUCTURED, "circulant_adapter"):
        for task, score in {"2%": at_two, "20%": at_twenty, "100%": at_twenty}.items():
            rows += cell(task, method, [score] * 3)
    write(results / "low_data_cifar.csv", rows)
    assert evidence.low_data().verdict == verdict


def test_every_number_of_the_page_here_follows_from_the_files():
    """The page in the repository is the one that the files in it make."""
    assert (evidence.RESULTS / "README.md").read_text() == report.page(report.CLAIMS)


def test_links_of_the_page_lead_somewhere():
    for name in re.findall(r"\]\(([^)]+)\)", (evidence.RESULTS / "README.md").read_text()):
        assert (evidence.RESULTS / name).is_file(), name
