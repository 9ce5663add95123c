"""Tests of `experiments.low_data` with a small grid of runs, of its picture, and of wrong options."""

import numpy as np
import pytest

from experiments import grid, image_grid, low_data
from experiments.grid import Grid
from experiments.rows import Run, read_rows, read_settings
from surm_jax.errors import UserError
from surm_jax.training.parsing import saved_config
from surm_jax.training.setup import prepare
from tests.training import tiny

MEASURED = {"metric": "accuracy", "loss": 0.5, "trainable": 7, "steps": 2, "seconds": 1.0}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function that runs the command in a temporary folder, and returns all rows of results so far.

    The data set and the weights are tiny. The arguments of the function are added to the command line.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(low_data, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(low_data, "SEARCHED", 50.0)
    tiny.write_files(tmp_path)

    def call(*arguments):
        low_data.main(
            ["--name=small", "--model=weights.safetensors", "--sets", "data.npz", "--augment=none", "--steps=2",
             "--batch-size=8", "--seeds", "0", "1", "--methods", "linear_probe", "--rates", "linear_probe=0.1",
             "--shares", "25", "100", *arguments]
        )  # fmt: skip
        return read_rows(tmp_path / "results" / "low_data_small_data.npz.csv")

    return call


@pytest.mark.exhaustive
def test_a_small_grid(small, tmp_path, capsys):
    rows = small()
    assert [(row["task"], row["part"], row["learning_rate"], row["seed"], row["steps"]) for row in rows] == [
        ("50%", "search", 0.1, 10, 2),
        *((share, "final", 0.1, seed, 2) for share in ("25%", "100%") for seed in (0, 1)),
    ]
    (runs,) = (tmp_path / "runs" / "low_data").glob("small_data.npz-????????")
    seen = {}
    for row in rows:
        folder = runs / row["task"] / f"linear_probe-{row['part']}-{row['learning_rate']:g}-{row['seed']}"
        task = prepare(saved_config(folder), row["seed"]).task
        held_out = len(task.holdout) if task.holdout else 0
        images = {task.dataset.train[index]["image"].tobytes() for index in range(task.examples)}
        seen.setdefault(row["task"], []).append(images)
        assert (task.examples, held_out) == {"50%": (16, 4), "25%": (10, 0), "100%": (40, 0)}[row["task"]]
        assert len(task.dataset.test) == 21
    # All seeds train on the same images, and those of the smaller share are among those of the larger one.
    assert all(images == several[0] for several in seen.values() for images in several)
    assert seen["25%"][0] < seen["100%"][0]
    shown = capsys.readouterr().out
    assert "| method | trained | 25% (accuracy) | 100% (accuracy) |\n" in shown
    means = [100 * np.mean([row["score"] for row in rows if row["task"] == share]) for share in ("25%", "100%")]
    (line,) = [line for line in shown.splitlines() if line.startswith("| linear_probe | 33 |")]
    assert [cell.split(" ±")[0].strip() for cell in line.split("|")[3:5]] == [f"{mean:.1f}" for mean in means]
    assert "| method | tried | 50% |" in shown
    assert (tmp_path / "results" / "low_data_small_data.npz.png").stat().st_size > 5000
    # The same command does not repeat any run.
    capsys.readouterr()
    assert small() == rows
    assert "== run" not in capsys.readouterr().out


@pytest.fixture
def pretended(monkeypatch):
    """Replace training by a function that returns a row at once. Return the list to which it adds its runs.

    The score of a run is its learning rate plus a hundredth of its seed.
    """
    made = []

    def measure(run, config, root, interruption):
        made.append(run)
        return {**run._asdict(), "score": run.learning_rate + run.seed / 100, **MEASURED}

    monkeypatch.setattr(grid, "measure", measure)
    return made


def test_other_calls_add_shares(small, pretended, tmp_path, capsys):
    small()
    rows = small("--shares", "50")
    assert len(pretended) == 7
    assert [(row["task"], row["part"], row["seed"]) for row in rows[5:]] == [("50%", "final", 0), ("50%", "final", 1)]
    # The table sorts the shares, whatever the order of the runs was. A report needs neither the data nor the model.
    for name in ("data.npz", "weights.safetensors"):
        (tmp_path / name).unlink()
    (capsys.readouterr(), low_data.main(["--name=small", "--sets", "data.npz", "--report"]))
    text = capsys.readouterr().out
    assert "| method | trained | 25% (accuracy) | 50% (accuracy) | 100% (accuracy) |\n" in text
    assert "| linear_probe | 7 | 10.5 ± 0.7 | 10.5 ± 0.7 | 10.5 ± 0.7 |\n" in text


def test_several_sets_have_a_table_each(small, pretended, tmp_path):
    (tmp_path / "other.npz").write_bytes((tmp_path / "data.npz").read_bytes())
    small("--sets", "data.npz", "other.npz")
    results = tmp_path / "results"
    one, other = (read_rows(results / f"low_data_small_{name}.csv") for name in ("data.npz", "other.npz"))
    assert one == other and len(pretended) == 2 * len(one) == 10
    assert read_settings(results / "low_data_small_other.npz.csv")["about"] == "40 training examples of other.npz"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "loraa"], "unknown method 'loraa'; did you mean 'lora'"),
        (["--shares", "0"], "above 0 and up to 100, got 0"),
        (["--shares", "50", "101"], "above 0 and up to 100, got 101"),
        (["--shares", "nan"], "above 0 and up to 100, got nan"),
        (["--shares", "1"], "1 %: 0 of 40 training examples are too few"),
        (["--sets", "data.npz", "dat.npz"], "no data file .*dat.npz; did you mean 'data.npz'"),
        (["--model=weigths.safetensors"], "no checkpoint 'weigths.safetensors'.*did you mean 'weights.safetensors'"),
        (["--model="], "there is no runs/pretrain_cifar/model.safetensors: python -m experiments.pretrain_cifar"),
        (["--name=none", "--report"], "nothing to report: .*low_data_none_data.npz.json does not exist"),
    ],
)
def test_what_cannot_be_is_one_message(small, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        small(*arguments)
    assert "\n" not in str(error.value)


def test_the_default_shares_of_the_default_set():
    counts = [low_data.examples_of(fraction, 25_000) for fraction in low_data.SHARES]
    assert counts == [250, 500, 1250, 2500, 5000, 25_000]
    assert image_grid.held_out(low_data.examples_of(low_data.SEARCHED, 25_000)) == 500
    tasks = [low_data.task_of(fraction) for fraction in low_data.SHARES]
    assert [low_data.share_of(task) for task in tasks] == list(low_data.SHARES)


def test_the_picture_shows_cells_by_share(tmp_path):
    whole = Grid(("1%", "100%"), {"lora": (0.1,), "full": (0.1,)}, (0, 1), searched="10%")
    rows = []
    for run, score in (
        (Run("10%", "lora", "search", 0.1, 10), 0.5),
        *((Run(task, "lora", "final", 0.1, seed), 0.5) for task in whole.tasks for seed in whole.seeds),
    ):
        rows.append({**run._asdict(), "score": score, **MEASURED})
    low_data.draw(whole, [], tmp_path / "empty.png")
    low_data.draw(whole, rows[:3], tmp_path / "one.png")
    low_data.draw(whole, rows, tmp_path / "two.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("empty", "one", "two")]
    assert len(set(pictures)) == 3
    # If the final run of a seed is missing, those of the other seeds are drawn all the same.
    low_data.draw(whole, rows[:-1], tmp_path / "lacking.png")
    assert (tmp_path / "lacking.png").read_bytes() not in (pictures[0], pictures[1])
