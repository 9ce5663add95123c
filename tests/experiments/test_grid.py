"""Tests of grids of runs: their order, searches for learning rates, tables, rows, and resuming a grid."""

import dataclasses
import itertools
import signal
import sys

import pytest

from experiments import ablations, digits_methods, glue_minilm, grid, low_data
from experiments.command import command
from experiments.grid import Grid, next_rate, work
from experiments.rows import KINDS, Run, add_row, note_settings, read_rows, read_settings, run_of
from experiments.tables import rate_table, score_table
from surm_jax.errors import UserError
from surm_jax.record.metrics import NotFiniteError
from surm_jax.record.progress import Interruption
from surm_jax.training import base_config, parse
from surm_jax.training.run import InterruptedRunError
from tests.training import tiny

RATES = {"linear_probe": (0.1, 0.2, 0.4), "lora": (0.01, 0.02, 0.04)}
GRID = Grid(("stsb", "rte"), RATES, (0, 1))


def row_of(run, score, loss=0.5):
    metric = {"stsb": "spearman", "rte": "accuracy"}[run.task]
    measured = {"metric": metric, "score": score, "loss": loss}
    return {**run._asdict(), **measured, "trainable": 40 if run.task == "rte" else 30, "steps": 4, "seconds": 1.5}


def searched(task, method, scores, losses=(0.5, 0.5, 0.5)):
    rows = zip(RATES[method], scores, losses, strict=True)
    return [row_of(Run(task, method, "search", rate, 10), score, loss) for rate, score, loss in rows]


def all_runs(whole):
    """Return all runs of a grid in the order in which they are done, and their rows of results.

    The middle learning rate always has the best score.
    """
    rows, runs = [], []
    while missing := whole.missing(rows):
        run = missing[0]
        assert len(whole.wanted(rows)) == len(runs) + len(missing)
        runs.append(run)
        rates = RATES[run.method]
        rows.append(row_of(run, (0.1, 0.3, 0.2)[rates.index(run.learning_rate)]))
    return runs, rows


def test_the_grid_is_made_in_order_and_each_run_once():
    runs, rows = all_runs(GRID)
    assert len(runs) == len(set(runs)) == GRID.size(rows) == 2 * 2 * (3 + 2)
    assert runs[:5] == [
        *(Run("stsb", "linear_probe", "search", rate, 10) for rate in (0.1, 0.2, 0.4)),
        *(Run("stsb", "linear_probe", "final", 0.2, seed) for seed in (0, 1)),
    ]
    assert [key for key, _ in itertools.groupby((run.task, run.method) for run in runs)] == [
        ("stsb", "linear_probe"), ("stsb", "lora"), ("rte", "linear_probe"), ("rte", "lora"),
    ]  # fmt: skip
    # If the row of a final run is lost, this run is the next one to do.
    for lost in rows:
        if lost["part"] == "final":
            assert GRID.missing([row for row in rows if row is not lost])[0]._asdict().items() <= lost.items()


def test_a_part_of_a_grid_counts_only_its_own_runs():
    _, rows = all_runs(GRID)
    part = dataclasses.replace(GRID, tasks=("rte",), rates={"lora": RATES["lora"]})
    assert not part.missing(rows)
    assert len(part.wanted(rows)) == part.size(rows) == 5
    # Rows of another task make no difference to the runs that are missing.
    assert part.missing([row for row in rows if row["task"] == "stsb"]) == part.wanted([])


def test_one_search_for_all_tasks():
    whole = dataclasses.replace(GRID, searched="rte")
    runs, rows = all_runs(whole)
    assert len(runs) == len(set(runs)) == whole.size(rows) == 2 * 3 + 2 * 2 * 2
    assert {run.task for run in runs if run.part == "search"} == {"rte"}
    assert runs[3] == Run("stsb", "linear_probe", "final", 0.2, 0)
    assert rate_table(whole, rows).splitlines() == [
        "| method | tried | rte |",
        "|---|---|---:|",
        "| linear_probe | 0.1, 0.2, 0.4 | 0.2 |",
        "| lora | 0.01, 0.02, 0.04 | 0.02 |",
    ]
    # The task of the searches need not have final runs of its own.
    other = dataclasses.replace(whole, tasks=("stsb",))
    assert not other.missing(rows)
    assert len(other.wanted(rows)) == other.size(rows) == 2 * 3 + 2 * 2


@pytest.mark.parametrize(
    ("scores", "losses", "best"),
    [
        ((0.1, 0.3, 0.2), (0.5, 0.5, 0.5), 0.02),
        ((0.1, 0.3, 0.3), (0.5, 0.4, 0.5), 0.02),
        ((-0.2, -0.1, -0.3), (0.5, 0.5, 0.5), 0.02),
    ],
)
def test_the_best_rate_has_the_best_score_and_then_the_smallest_loss(scores, losses, best):
    rows = searched("rte", "lora", scores, losses)
    assert GRID.best_rate(rows, "rte", "lora") == best
    assert GRID.best_rate(rows[:2], "rte", "lora") is GRID.best_rate(rows, "stsb", "lora") is None
    # The scores of final runs do not influence the choice of the learning rate.
    assert GRID.best_rate([*rows, row_of(Run("rte", "lora", "final", 0.01, 0), 0.99)], "rte", "lora") == best
    # A learning rate that is not in the grid, but that an earlier command tried, does influence it.
    other = row_of(Run("rte", "lora", "search", 0.03, 10), 0.99)
    assert GRID.best_rate([*rows, other], "rte", "lora") == 0.03


def tried(scores):
    """Return the rows of a search for a learning rate, given the score at each rate."""
    return [row_of(Run("rte", "lora", "search", rate, 10), score) for rate, score in scores.items()]


@pytest.mark.parametrize(
    ("scores", "beyond"),
    [
        ({0.01: 0.1, 0.02: 0.3, 0.04: 0.2}, None),
        ({0.01: 0.1, 0.02: 0.3, 0.04: 0.4}, 0.1),
        ({0.01: 0.5, 0.02: 0.3, 0.04: 0.4}, 0.003),
        # The search continues as long as the best rate is at an end of the list, up to five rates in all.
        ({0.003: 0.6, 0.01: 0.5, 0.02: 0.3, 0.04: 0.4}, 0.001),
        ({0.001: 0.7, 0.003: 0.6, 0.01: 0.5, 0.02: 0.3, 0.04: 0.4}, None),
        # If all scores are equal, most likely the models predict a constant, so a smaller rate is tried.
        ({0.01: 0.0, 0.02: 0.0, 0.04: 0.0}, 0.003),
        # The rate 0.02, with which the search was to begin, has not been tried yet.
        ({0.01: 0.1, 0.04: 0.4}, 0.02),
    ],
)
def test_a_search_goes_beyond_its_ends(scores, beyond):
    rows = tried(scores)
    rates = GRID.rates_to_try(rows, "rte", "lora")
    assert {*rates} - {*scores} == ({beyond} - {None})
    best = None if beyond else max(scores, key=scores.get)
    assert GRID.best_rate(rows, "rte", "lora") == best


def test_a_short_list_of_rates_is_all_that_is_tried():
    short = dataclasses.replace(GRID, rates={"lora": (0.01, 0.02)})
    assert short.best_rate(tried({0.01: 0.1, 0.02: 0.4}), "rte", "lora") == 0.02


def test_the_scale_of_rates():
    ladder = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]
    assert [next_rate(rate, 1) for rate in ladder[:-1]] == ladder[1:]
    assert [next_rate(rate, -1) for rate in ladder[1:]] == ladder[:-1]


def test_tables_of_an_unfinished_grid():
    rows = searched("rte", "lora", (0.1, 0.3, 0.2)) + searched("rte", "linear_probe", (0.1, 0.2, 0.3))
    rows += [row_of(Run("rte", "linear_probe", "search", rate, 10), 0.3 + rate) for rate in (1.0, 3.0)]
    rows += [row_of(Run("rte", "lora", "final", 0.02, seed), score) for seed, score in ((0, 0.5), (1, 0.7))]
    # The table does not use final runs whose learning rate is no longer the best one.
    rows += [row_of(Run("rte", "linear_probe", "final", rate, seed), 0.5) for rate, seed in ((3.0, 0), (0.2, 1))]
    # A cell without the final runs of all seeds says so. The mean is empty if a task or a seed is missing.
    assert score_table(GRID, rows).splitlines() == [
        "| method | trained | rte (accuracy) | mean |",
        "|---|---:|---:|---:|",
        "| linear_probe | 40 | 50.0 (1 of 2 seeds) |  |",
        "| lora | 40 | 60.0 ± 14.1 |  |",
    ]
    assert rate_table(GRID, rows).splitlines()[2:] == [
        "| linear_probe | 0.1, 0.2, 0.4, 1, 3 |  | 3 * |",
        "| lora | 0.01, 0.02, 0.04 |  | 0.02 |",
    ]
    flat = [row_of(Run("rte", "lora", "search", rate, 10), 0.5) for rate in (0.001, 0.003, 0.01, 0.02, 0.04)]
    assert rate_table(GRID, flat).splitlines()[-1].endswith(" 0.001 - |")
    rows += searched("stsb", "lora", (0.1, 0.3, 0.2))
    rows += [row_of(Run("stsb", "lora", "final", 0.02, seed), 0.8) for seed in (0, 1)]
    assert score_table(GRID, rows).splitlines()[-1] == "| lora | 40 | 80.0 ± 0.0 | 60.0 ± 14.1 | 70.0 |"
    assert score_table(GRID, rows, mean=False).splitlines()[-1] == "| lora | 40 | 80.0 ± 0.0 | 60.0 ± 14.1 |"
    assert score_table(GRID, []).splitlines()[2:] == ["| linear_probe |  |  |", "| lora |  |  |"]


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
    header, *lines = path.read_text().splitlines()
    assert header == "task,method,part,learning_rate,seed,metric,score,loss,trainable,steps,seconds"
    assert lines[-1] == "stsb,lora,final,3e-05,2,spearman,0.1,0.5,30,4,1.5"


@pytest.fixture
def pretended(monkeypatch):
    """Replace training by a function that returns a row at once. Return the list to which it adds its runs.

    The middle learning rate of a search gets the best score.
    """
    made = []

    def measure(run, config, root, interruption):
        made.append(run)
        return row_of(run, (0.1, 0.3, 0.2)[RATES[run.method].index(run.learning_rate)])

    monkeypatch.setattr(grid, "measure", measure)
    return made


def test_a_grid_continues_where_it_was_stopped(tmp_path, monkeypatch, capsys, pretended):
    path, measure, calls = tmp_path / "results" / "rows.csv", grid.measure, []

    def stopped(run, *arguments):
        calls.append(run)
        if len(calls) == 4:
            raise InterruptedRunError("SIGTERM: saved step 2 of 4", 143)
        return measure(run, *arguments)

    monkeypatch.setattr(grid, "measure", stopped)
    with pytest.raises(InterruptedRunError):
        work(GRID, path, lambda run: None, tmp_path)
    assert len(read_rows(path)) == 3
    work(GRID, path, lambda run: None, tmp_path)
    # The fourth run, which was interrupted, is the only one that is done again.
    assert calls[4] == calls[3] and len(calls) == 21
    assert [run_of(row) for row in read_rows(path)] == calls[:3] + calls[4:] == pretended
    said = capsys.readouterr().out
    assert "run 4 of 20" in said and "run 20 of 20" in said
    work(GRID, path, lambda run: None, tmp_path)
    assert len(calls) == 21


def test_a_signal_between_two_runs_starts_no_other(tmp_path, monkeypatch):
    made = []

    def measure(run, config, root, interruption):
        made.append(run)
        signal.raise_signal(signal.SIGINT)
        return row_of(run, 0.5)

    monkeypatch.setattr(grid, "measure", measure)
    with pytest.raises(
        InterruptedRunError, match=r"\d+ runs to make for .*rows.csv; the same command continues"
    ) as stop:
        work(GRID, tmp_path / "rows.csv", lambda run: None, tmp_path)
    assert stop.value.status == 130
    assert len(made) == len(read_rows(tmp_path / "rows.csv")) == 1


def test_two_processes_on_parts_of_one_grid(tmp_path, monkeypatch, pretended):
    path, rows = tmp_path / "rows.csv", all_runs(GRID)[1]
    first, second = [dataclasses.replace(GRID, rates={method: rates}) for method, rates in RATES.items()]
    measure = grid.measure

    # During the third run of the first process, the second process does all of its runs.
    def interleaved(run, *arguments):
        if len(pretended) == 2:
            monkeypatch.setattr(grid, "measure", measure)
            work(second, path, lambda run: None, tmp_path)
        return measure(run, *arguments)

    monkeypatch.setattr(grid, "measure", interleaved)
    work(first, path, lambda run: None, tmp_path)
    assert sorted(map(repr, read_rows(path))) == sorted(map(repr, rows))
    assert not GRID.missing(read_rows(path))


def test_what_a_run_measured(tmp_path):
    files = tiny.write_files(tmp_path)
    values = {"model.variant": "", "optim.steps": 2}
    for run, config in (
        (Run("a/b:1.0.0", "lora", "search", 0.01, 3), tiny.make_config(files, "lora", **values, **{"data.holdout": 8})),
        (Run("a/b:1.0.0", "lora", "final", 0.01, 3), tiny.make_config(files, "lora", **values)),
    ):
        with Interruption() as interruption:
            row = grid.measure(run, config, tmp_path / "runs", interruption)
        folder = tmp_path / "runs" / "a_b_1.0.0" / f"lora-{run.part}-0.01-3"
        assert (folder / "result.json").is_file()
        assert list(row) == list(KINDS)
        assert row.items() >= {**run._asdict(), "metric": "accuracy", "steps": 2, "trainable": 93}.items()
        # The score is an accuracy on 8 held-out examples or on 21 test examples, so it is a multiple of 1/8 or 1/21.
        count = 8 if run.part == "search" else 21
        assert count * row["score"] == pytest.approx(round(count * row["score"]), abs=1e-4)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(InterruptedRunError("SIGTERM: saved", 143), 143, "SIGTERM: saved"), (UserError("no"), "error: no", "")],
)
def test_a_script_ends_with_one_line(error, status, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        command(main)
    assert exit_.value.code == status
    assert said in capsys.readouterr().err
    command(lambda: print("done", file=sys.stderr))
    assert "done" in capsys.readouterr().err


def test_a_run_that_diverges_has_a_row(tmp_path, monkeypatch):
    def diverges(config, seed, folder, interruption):
        raise NotFiniteError("train_loss is nan at step 3")

    monkeypatch.setattr(grid, "train", diverges)
    with Interruption() as interruption:
        found = grid.measure(Run("rte", "lora", "search", 0.04, 10), parse(base_config()), tmp_path, interruption)
        add_row(tmp_path / "rows.csv", found)
        final = grid.measure(Run("rte", "lora", "final", 0.02, 0), parse(base_config()), tmp_path, interruption)
        add_row(tmp_path / "rows.csv", final)
    rows = read_rows(tmp_path / "rows.csv")
    assert rows[0] == found
    # In a search, a run that diverged has the worst score.
    others = [row for row in searched("rte", "lora", (0.0, 0.2, 0.0)) if row["learning_rate"] != 0.04]
    assert GRID.best_rate([*rows, *others], "rte", "lora") == 0.02
    assert GRID.metrics([*others, *rows]) == {"rte": "accuracy"}
    # The table reports a final run that diverged, and the grid goes on to the next cell.
    rows += [*others, row_of(Run("rte", "lora", "final", 0.02, 1), 0.5)]
    assert score_table(GRID, rows).splitlines()[-1] == "| lora | 40 | 1 of 2 diverged |  |"
    assert GRID.missing(rows)[0].method == "linear_probe"


def test_rows_of_other_settings_are_not_gone_on_with(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    # As long as there are no rows, the settings may change.
    for steps in (4, 5):
        note_settings(path, {"steps": steps, "set": ("a=1",)})
    add_row(path, row_of(Run("rte", "lora", "search", 0.01, 10), 0.5))
    note_settings(path, {"steps": 5, "set": ("a=1",)})
    with pytest.raises(UserError, match=r"another grid: steps was 5, now 6; set was \['a=1'\], now \[\]\. Move its"):
        note_settings(path, {"steps": 6, "set": ()})
    assert read_settings(path) == {"steps": 5, "set": ["a=1"]}
    # If the settings of the rows are unknown, adding rows is refused too.
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"the settings of the rows in .*rows.csv are unknown: .*json does not exist"):
        note_settings(path, {"steps": 5, "set": ()})


# The grids whose rows are in the repository, by the name of their files. A value returns the grid, given all its rows.
COMMITTED = {
    "ablations_digits": lambda rows: ablations.whole_grid("digits"),
    "digits_methods": lambda rows: digits_methods.GRID,
    "glue_minilm": lambda rows: glue_minilm.whole_grid(),
    "image_table_cifar": lambda rows: Grid.of_rows(rows),
    "low_data_cifar": low_data.grid_of,
}


@pytest.mark.parametrize("name", COMMITTED)
def test_nothing_is_left_to_run_of_the_committed_grids(name):
    rows = read_rows(grid.RESULTS / f"{name}.csv")
    assert rows and read_settings(grid.RESULTS / f"{name}.csv")
    assert not COMMITTED[name](rows).missing(rows)


# A grid that takes many hours. Its rows are kept as they come, and no page shows them yet.
GROWING = {"image_table_dinov2"}


def test_every_committed_grid_is_looked_at():
    assert {path.stem for path in grid.RESULTS.glob("*.json")} == {*COMMITTED} | GROWING
