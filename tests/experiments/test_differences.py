"""Tests of `experiments.differences`: confidence intervals against their formula, and the scores that are compared."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments import differences
from experiments.differences import Cell, difference, scores
from experiments.rows import Run, add_row


def test_the_confidence_interval_is_welchs():
    one, other = [0.9, 0.95, 0.97], [0.8, 0.82, 0.9]
    found = difference(one, other)
    # The error is the quantile of Student's t at Welch's degrees of freedom, times the standard error.
    parts = [np.var(sample, ddof=1) / 3 for sample in (one, other)]
    freedom = sum(parts) ** 2 / sum(part**2 / 2 for part in parts)
    assert found.value == pytest.approx(np.mean(one) - np.mean(other))
    assert found.error == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts)))


def test_samples_without_variance_and_with_diverged_runs():
    assert difference([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.0)
    assert str(difference([0.5, math.nan], [0.2, 0.3])) == "unknown: runs diverged"


def cell_rows(task, method, values, rate=0.1, score=0.5):
    measured = {"metric": "accuracy", "loss": 1.0, "trainable": 7, "steps": 1, "seconds": 1.0}
    runs = [(Run(task, method, "search", rate, 10), score)]
    runs += [(Run(task, method, "final", rate, seed), value) for seed, value in enumerate(values)]
    return [{**run._asdict(), **measured, "score": value} for run, value in runs]


def test_scores_are_those_of_the_chosen_rate_and_means_over_tasks_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(differences, "RESULTS", tmp_path)
    rows = cell_rows("a", "lora", [0.1, 0.1, 0.1], rate=0.1, score=0.3)
    rows += cell_rows("a", "lora", [0.7, 0.8, 0.9], rate=0.2, score=0.6) + cell_rows("b", "lora", [0.1, 0.3, 0.2])
    for row in rows:
        add_row(tmp_path / "grid.csv", row)
    assert scores(Cell("grid", ("a",), "lora")) == pytest.approx([70, 80, 90])
    assert scores(Cell("grid", ("a", "b"), "lora")) == pytest.approx([40, 55, 55])


def test_one_search_may_serve_all_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(differences, "RESULTS", tmp_path)
    for row in cell_rows("10%", "full", []) + cell_rows("2%", "full", [0.5, 0.6])[1:]:
        add_row(tmp_path / "grid.csv", row)
    assert scores(Cell("grid", ("2%",), "full")) == pytest.approx([50, 60])


def test_every_comparison_has_all_seeds():
    for title, cells in differences.COMPARISONS.items():
        assert [len(scores(cell)) for cell in cells] == [3, 3], title
    assert differences.tables()["differences"].count("\n") == len(differences.COMPARISONS) + 1
