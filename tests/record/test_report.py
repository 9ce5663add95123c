import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from matplotlib.figure import Figure

from surm_jax.peft import CirculantUpdate, Description, Rule, adapt
from surm_jax.record import report
from surm_jax.record.report import combine, draw_curves, make_result, table

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


def write_metrics(folder, steps):
    lines = [{"step": step, "train_loss": 1 / step, "train_accuracy": 0.1 * step} for step in range(1, steps)]
    lines.append({"step": steps, "test_loss": 0.3, "test_accuracy": 0.7, "test_examples": 21})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(folder, model):
    draw_curves(folder, model, "accuracy")
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]
    return matplotlib.image.imread(folder / "curves.png")


@pytest.fixture
def figures(monkeypatch):
    """All Matplotlib figures that the report has drawn so far in this test."""
    made = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(report, "Figure", Kept)
    return made


def test_curves_become_a_picture(tmp_path, recwarn, figures):
    plain = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    write_metrics(tmp_path, 9)
    long = picture(tmp_path, plain)
    write_metrics(tmp_path, 4)
    short = picture(tmp_path, plain)
    assert long.shape == short.shape and not np.array_equal(long, short)
    assert not recwarn.list
    for figure, last in zip(figures, (9, 4), strict=True):
        steps = np.arange(1, last)
        curves = {"loss": (1 / steps, 0.3), "accuracy": (0.1 * steps, 0.7)}
        assert [axes.get_ylabel() for axes in figure.axes] == list(curves)
        for axes, (train, test) in zip(figure.axes, curves.values(), strict=True):
            assert [line.get_label() for line in axes.lines] == ["train", "test"]
            np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([steps, train], axis=1), rtol=1e-12)
            np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[last, test]])


def test_the_picture_shows_the_largest_update(tmp_path, figures):
    layers = nnx.Dict(small=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), large=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    model, _ = adapt(layers, [Rule("small|large", CirculantUpdate())], rngs=nnx.Rngs(2))
    model.small.delta["default"].r1[...], model.large.delta["default"].r1[...] = jnp.ones(4), 9 * jnp.ones(4)
    write_metrics(tmp_path, 4)
    both = picture(tmp_path, model)
    # The picture shows the update of `large`, the circulant matrix of 9 * r2. The range of its colours is symmetric and
    # reaches the largest absolute entry.
    axes = figures[0].axes[2]
    (image,) = axes.images
    update = scipy.linalg.circulant(9 * np.asarray(model.large.delta["default"].r2[...])).T
    np.testing.assert_allclose(image.get_array(), update, rtol=1e-5)
    assert axes.get_title() == "update of large"
    assert image.get_clim() == pytest.approx((-np.abs(update).max(), np.abs(update).max()), rel=1e-5)
    assert both.shape[1] > picture(tmp_path, layers).shape[1]
    model.small.delta["default"].r1[...] = 2 * jnp.ones(4)
    assert np.array_equal(picture(tmp_path, model), both)
    model.large.delta["default"].r1[...] = 5 * jnp.ones(4)
    assert not np.array_equal(picture(tmp_path, model), both)
