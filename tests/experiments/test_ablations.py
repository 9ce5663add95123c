"""Tests of `experiments.ablations`: the configurations of its variants, and the runs and reports of its grid."""

import argparse

import pytest

from experiments import ablations, grid, rows
from experiments.rows import Run
from experiments.tables import mean_and_deviation
from surm_jax.errors import UserError
from surm_jax.training import parse


def options(**changes):
    values = {"config": ablations.DIGITS, "set": [], "steps": 2, "holdout": 20, **changes}
    return argparse.Namespace(**values)


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_is_a_job(name):
    variant = ablations.VARIANTS[name]
    config = parse(ablations.config_of(Run("digits", name, "search", 0.5, 3), options()))
    assert (config.peft.method, config.peft.target, config.seeds) == (variant.method, variant.target, (3,))
    assert config.optim.learning_rate[variant.method] == 0.5
    assert (config.optim.steps, config.data.holdout) == (2, 20)
    method = config.peft.methods[variant.method]
    assert {key: getattr(method, key) for key in variant.settings} == dict(variant.settings)


def test_variants_of_a_question_differ_from_each_other():
    for question, variants in ablations.QUESTIONS.items():
        assert len({repr(variant) for variant in variants.values()}) == len(variants) > 1, question
    # If a variant occurs in several questions, its name means the same settings in all of them.
    for variants in ablations.QUESTIONS.values():
        for name, variant in variants.items():
            assert ablations.VARIANTS[name] == variant


@pytest.mark.exhaustive
def test_runs_go_on_and_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)
    monkeypatch.setattr(ablations, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ablations, "VARIANTS", {**ablations.VARIANTS})
    name = "circulant, Q V"
    command = ["--variants", name, "--steps=2", "--holdout=20", "--set", "log.metrics_every=1"]
    ablations.main(command)
    made = rows.read_rows(tmp_path / "ablations_digits.csv")
    searches = [row for row in made if row["part"] == "search"]
    assert 3 <= len(searches) <= grid.MOST_RATES
    assert [(row["part"], row["seed"]) for row in made[len(searches) :]] == [("final", seed) for seed in range(3)]
    # The trained parameters are those of the head, and two vectors for each of Q and V in four blocks of width 64.
    assert {row["trainable"] for row in made} == {4 * 2 * 2 * 64 + 64 * 5 + 5}
    ablations.main(command)
    assert rows.read_rows(tmp_path / "ablations_digits.csv") == made
    (capsys.readouterr(), ablations.main(["--report"]))
    text = capsys.readouterr().out
    mean = mean_and_deviation([100 * row["score"] for row in made if row["part"] == "final"])
    assert f"| circulant, Q V | 1,349 | {mean} |" in text
    assert "| LoRA, Q V |  |  |" in text
    assert (tmp_path / "ablations_digits.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="another grid: steps was 2, now 3"):
        ablations.main([*command, "--steps=3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "configs/digit.py"}, "no configuration 'configs/digit.py'"),
        ({"set": ["data.nme=x"]}, "no key 'data.nme'; did you mean 'data.name'"),
        ({"set": ["data.batch_size=many"]}, "data.batch_size=many"),
        ({"set": ["peft.method=lora"]}, "the experiment sets peft.method itself"),
    ],
)
def test_wrong_input(changes, message):
    with pytest.raises(UserError, match=message):
        ablations.config_of(Run("digits", "LoRA, Q V", "final", 0.1, 0), options(**changes))
