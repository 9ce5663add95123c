"""Tests of `experiments.image_table` with small grids of runs, later commands that add runs, and wrong options."""

import argparse
import json

import numpy as np
import pytest

from experiments import grid, image_grid, image_table, pretrain_cifar
from experiments.grid import Grid
from experiments.rows import Run, read_rows, read_settings
from surm_jax.errors import UserError
from surm_jax.training import base_config, parse
from surm_jax.training.parsing import saved_config
from surm_jax.training.run import InterruptedRunError
from surm_jax.training.setup import describe_config, prepare
from tests.experiments import tiny_cifar
from tests.training import tiny


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function that runs the command in a temporary folder, and returns all rows of results so far.

    The data set and the weights are tiny. The arguments of the function are added to the command line.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_table, "RESULTS", tmp_path / "results")
    tiny.write_files(tmp_path)

    def call(*arguments):
        image_table.main(
            ["--name=small", "--model=weights.safetensors", "--sets", "data.npz", "--augment=none", "--steps=2",
             "--batch-size=8", "--seeds", "0", "1", *arguments]
        )  # fmt: skip
        return read_rows(tmp_path / "results" / "image_table_small.csv")

    return call


@pytest.fixture
def pretended(monkeypatch):
    """Replace training by a function that returns a row at once. Return the list to which it adds its runs.

    The score of a run is its learning rate (0 if the rate is 0.5 or larger) plus a hundredth of its seed.
    """
    made = []

    def measure(run, config, root, interruption):
        made.append(run)
        return row_of(run, (run.learning_rate if run.learning_rate < 0.5 else 0) + run.seed / 100, 7)

    monkeypatch.setattr(grid, "measure", measure)
    return made


def row_of(run, score, trained):
    measured = {"metric": "accuracy", "score": score, "loss": 0.5, "trainable": trained, "steps": 2, "seconds": 1.0}
    return {**run._asdict(), **measured}


@pytest.mark.exhaustive
def test_a_small_grid(small, tmp_path, capsys):
    arguments = ("--methods", "linear_probe", "--rates", "linear_probe=0.1,0.01")
    rows = small(*arguments)
    best = max(rows[:2], key=lambda row: (row["score"], -row["loss"]))["learning_rate"]
    assert [(row["task"], row["method"], row["part"], row["learning_rate"], row["seed"]) for row in rows] == [
        *(("data.npz", "linear_probe", "search", rate, 10) for rate in (0.01, 0.1)),
        *(("data.npz", "linear_probe", "final", best, seed) for seed in (0, 1)),
    ]
    assert {row["trainable"] for row in rows} == {33}
    (runs,) = (tmp_path / "runs" / "image_table").glob("small-????????")
    for row in rows:
        folder = runs / "data.npz" / f"{row['method']}-{row['part']}-{row['learning_rate']:g}-{row['seed']}"
        config = json.loads((folder / "config.json").read_text())
        # A search holds out a fifth of the 40 training examples.
        assert config["data"]["holdout"] == (8 if row["part"] == "search" else 0)
        assert (config["optim"]["steps"], config["data"]["batch_size"], config["seeds"]) == (2, 8, [row["seed"]])
        assert config["optim"]["learning_rate"][row["method"]] == row["learning_rate"]
    text = image_table.tables("small")["scores"]
    assert "| method | trained | data.npz (accuracy) | mean |" in text
    noted = read_settings(tmp_path / "results" / "image_table_small.csv")
    assert (noted["model"], noted["about"], noted["steps"]) == ("weights.safetensors", "all training examples", 2)
    assert f"| linear_probe | 33 | {100 * np.mean([row['score'] for row in rows[2:]]):.1f} ± " in text
    assert (tmp_path / "results" / "image_table_small.png").stat().st_size > 5000
    # The same command does not repeat any run.
    capsys.readouterr()
    assert small(*arguments) == rows
    assert "== run" not in capsys.readouterr().out


def test_other_calls_add_methods_and_rates(small, pretended, tmp_path, capsys):
    small("--methods", "lora", "--rates", "lora=0.1,0.2")
    assert len(pretended) == 4
    small("--methods", "circulant", "--rates", "circulant=0.1")
    # The learning rates 0.1 and 0.2, which an earlier command tried, belong to the search too. The new rate 0.3 is the
    # best of these three, so the search also tries the next rate above it, 1, which is not better.
    small("--methods", "lora", "--rates", "lora=0.3")
    assert pretended[7:] == [
        Run("data.npz", "lora", "search", 0.3, 10),
        Run("data.npz", "lora", "search", 1.0, 10),
        *(Run("data.npz", "lora", "final", 0.3, seed) for seed in (0, 1)),
    ]
    small("--methods", "lora", "--rates", "lora=0.2")
    assert len(pretended) == 11
    # A report shows all methods. It needs neither the data nor the model, nor any option but the name.
    for name in ("data.npz", "weights.safetensors"):
        (tmp_path / name).unlink()
    (capsys.readouterr(), image_table.main(["--name=small", "--report"]))
    text = capsys.readouterr().out
    assert (
        "| method | trained | data.npz (accuracy) | mean |\n"
        "|---|---:|---:|---:|\n"
        "| lora | 7 | 30.5 ± 0.7 | 30.5 |\n"
        "| circulant | 7 | 10.5 ± 0.7 | 10.5 |\n\n"
    ) in text
    assert "| lora | 0.1, 0.2, 0.3, 1 | 0.3 |" in text


def test_a_grid_that_was_stopped_goes_on_with_the_same_run(small, pretended, monkeypatch):
    measure = grid.measure

    def stopped(run, config, root, interruption):
        row = measure(run, config, root, interruption)
        if len(pretended) == 2:
            raise InterruptedRunError("SIGINT: saved step 1 of 2", 130)
        return row

    monkeypatch.setattr(grid, "measure", stopped)
    call = ("--methods", "linear_probe", "--rates", "linear_probe=0.1")
    with pytest.raises(InterruptedRunError):
        small(*call)
    assert [row["seed"] for row in small(*call)] == [10, 0, 1]
    assert [run.seed for run in pretended] == [10, 0, 0, 1]


def test_vtab_takes_a_thousand_examples_and_a_fifth_of_them_to_choose(tmp_path):
    settings = {
        "model": "m",
        "variant": "",
        "image_size": 56,
        "classes": (),
        "augment": "none",
        "steps": 5,
        "batch_size": 8,
    }
    source = image_grid.Source("dtd", image_table.VTAB_EXAMPLES)
    search, final = (
        image_grid.run_config(settings, Run("dtd", "lora", part, 0.5, 3), source, "") for part in ("search", "final")
    )
    assert (search.data.train_examples, search.data.holdout) == (1000, 200)
    assert (final.data.train_examples, final.data.holdout) == (1000, 0)
    assert (final.model.image_size, final.optim.learning_rate["lora"]) == (56, 0.5)
    assert (final.seeds, final.data.name, final.optim.steps) == ((3,), "dtd", 5)


@pytest.mark.exhaustive
def test_by_default_the_classes_are_those_that_the_model_never_saw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(image_table, "VTAB_EXAMPLES", 15)
    folder = tiny_cifar.write_data(tmp_path / "tfds")
    tiny_cifar.write_model(pretrain_cifar.MODEL)
    arguments = [f"--data={folder}", "--steps=1", "--batch-size=8", "--methods", "linear_probe"]
    image_table.main([*arguments, "--rates", "linear_probe=0.1", "--seeds", "0", "--vtab"])
    search, final = read_rows(tmp_path / "results" / "image_table_cifar.csv")
    assert (search["part"], final["part"]) == ("search", "final")
    (runs,) = (tmp_path / "runs" / "image_table").glob("cifar-????????")
    task = prepare(saved_config(runs / "cifar10" / "linear_probe-final-0.1-0"), 0).task
    assert task.classes == ("automobile", "cat", "dog", "horse", "truck")
    # The limit of 15 examples comes from --vtab. All five classes together have 40 training images.
    assert (task.examples, len(task.dataset.test)) == (15, 10)
    with pytest.raises(
        UserError, match=r"cifar\.json is of another grid: about was '15 tr.*', now 'all tr.*another --name"
    ):
        image_table.main(arguments)
    # A file of weights with the same path but another content is refused too.
    pretrain_cifar.MODEL.write_bytes(pretrain_cifar.MODEL.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"digest was '\w{16}', now '\w{16}'"):
        image_table.main([*arguments, "--vtab"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "circulent"], "unknown method 'circulent'; did you mean 'circulant'"),
        (["--rates", "lara=0.1"], "unknown method 'lara'; did you mean 'lora'"),
        (["--rates", "full=0.1"], "--rates of full, which --methods leaves out"),
        (["--rates", "lora"], "--rates lora: expected METHOD=RATE,RATE,"),
        (["--rates", "lora=0.1,fast"], "--rates lora=0.1,fast: expected METHOD=RATE,RATE,"),
        (["--sets", "dat.npz"], "no data file .*dat.npz; did you mean 'data.npz'"),
        (["--sets", "glue/rte"], "glue/rte"),
        (["--classes", "0", "7"], "'data.npz' has no class '7'"),
        (["--model="], "there is no runs/pretrain_cifar/model.safetensors: python -m experiments.pretrain_cifar"),
        (["--model=weigths.safetensors"], "no checkpoint 'weigths.safetensors'.*did you mean 'weights.safetensors'"),
        (["--steps=0"], "config.optim.steps must be at least 1"),
        (["--name=none", "--report"], "nothing to report: .*image_table_none.json does not exist"),
    ],
)
def test_what_cannot_be_is_one_message(small, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        small("--methods", "lora", "--rates", "lora=0.1", *arguments)
    assert "\n" not in str(error.value)


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    image_grid.add_options(parser)
    return parser.parse_args(arguments)


def test_rates_of_methods_without_any_here_lie_around_their_own():
    rates = image_grid.rates_of(options_of("--methods", "c3a", "lora", "--rates", "lora=3,1"))
    assert rates == {"c3a": (0.03, 0.1, 0.3), "lora": (1.0, 3.0)}
    assert image_grid.rates_of(options_of()) == image_grid.RATES


def test_methods_at_equal_parameters_train_equally_many_numbers():
    equal, counts = ("lora", "circulant", "toeplitz", "kronecker", "circulant_adapter"), {}
    for method in (*equal, "linear_probe", "bottleneck"):
        config = base_config()
        config.model.variant, config.model.depth, config.model.num_classes = "mini", 2, 5
        config.peft.method = method
        parsed = parse(config)
        counts[method] = describe_config(parsed).trainable
    assert {counts[method] for method in equal} == {2 * 3 * 384 + 5 * 193}
    assert counts["linear_probe"] == 5 * 193
    assert counts["bottleneck"] > 30 * counts["lora"]


def test_panels_of_several_sets(tmp_path):
    rows = []
    for task, trained in (("a", 10), ("b", 20), ("c", 30), ("d", 40)):
        rows.append(row_of(Run(task, "lora", "search", 0.1, 10), 0.5, trained))
        rows += [row_of(Run(task, "lora", "final", 0.1, seed), 0.5 + seed / 10, trained) for seed in (0, 1)]
    rows.append(row_of(Run("d", "full", "search", 0.1, 10), 0.5, 90))
    whole = Grid.of_rows(rows, order=("full", "toeplitz"))
    assert whole == Grid(("a", "b", "c", "d"), {"full": (), "lora": ()}, (0, 1))
    image_table.draw(whole, rows, tmp_path / "panels.png")
    assert (tmp_path / "panels.png").stat().st_size > 10_000
    image_table.draw(Grid((), {}, ()), [], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 2000
