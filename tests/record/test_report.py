import json

import numpy as np
import pytest

from surm_jax.peft import Description
from surm_jax.record.report import combine, make_result, table

DESCRIPTION = Description((), adapter=30, other=12, total=2000)


def result_of(accuracy, **changed):
    options = {"steps": 9, "seconds": 1.234, "examples_per_second": 56.78, "adapter_bytes": 9210, **changed}
    options = {"corrupt": {"train": 0, "test": 2}, **options}
    tests = {"test": {"accuracy": accuracy, "loss": 2 - accuracy, "examples": 21}}
    return make_result("lora", tests, DESCRIPTION, seed=3, metrics=("accuracy",), classes=("cat", "dog"), **options)


def test_a_result_has_what_it_must_have():
    result = result_of(0.75)
    assert (
        result.items()
        >= {
            "method": "lora",
            "seeds": [3],
            "metric": "test_accuracy",
            "metrics": {"test_accuracy": 0.75, "test_loss": 1.25},
            "classes": ["cat", "dog"],
            "examples": {"test": 21},
            "corrupt_examples": {"train": 0, "test": 2},
            "parameters": {"trainable": 42, "adapter": 30, "total": 2000},
            "steps": 9,
            "seconds": 1.23,
            "examples_per_second": 56.8,
            "adapter_bytes": 9210,
            "device": "8 x cpu",
        }.items()
    )
    assert {"jax", "flax", "optax"} <= result["versions"].keys()
    assert json.loads(json.dumps(result)) == result


def test_a_run_of_one_step_has_no_speed():
    assert result_of(0.5, examples_per_second=None)["examples_per_second"] is None


def test_seeds_are_combined_into_mean_and_sample_deviation():
    accuracies = [0.5, 0.75, 0.8]
    corrupt = ({"train": 1, "test": 0}, {"train": 4, "test": 0}, {"train": 2, "test": 0})
    runs = zip((3, 1, 7), accuracies, corrupt, strict=True)
    result = combine({seed: result_of(accuracy, corrupt=met) for seed, accuracy, met in runs})
    assert result["corrupt_examples"] == {"train": 4, "test": 0}
    assert result["seeds"] == [3, 1, 7]
    measured = result["metrics"]["test_accuracy"]
    assert measured["seeds"] == accuracies
    assert measured["mean"] == pytest.approx(np.mean(accuracies))
    assert measured["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert result["metrics"]["test_loss"]["mean"] == pytest.approx(2 - np.mean(accuracies))
    assert result["seconds"] == pytest.approx(3 * 1.23)
    assert result["parameters"] == result_of(0.5)["parameters"]
    assert json.loads(json.dumps(result)) == result


def test_the_table_has_a_line_for_each_result():
    one, other = result_of(0.9), result_of(0.5, seconds=1000.0)
    mean = {**combine({0: one, 1: other}), "method": "lora, mean"}
    head, first, second, last = table([one, other, mean]).splitlines()
    assert head.split() == ["method", "trained", "share", "test", "accuracy", "seconds", "adapter"]
    assert first.split() == ["lora", "42", "2.100", "%", "90.0", "%", "1.2", "9.2", "kB"]
    assert second.split() == ["lora", "42", "2.100", "%", "50.0", "%", "1000.0", "9.2", "kB"]
    assert last.split() == ["lora,", "mean", "42", "2.100", "%", "70.0", "±", "28.3", "%", "1001.2", "9.2", "kB"]
    assert len({len(line) for line in (head, first, second, last)}) == 1
