import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from matplotlib.figure import Figure

from surm_jax.peft import CirculantUpdate, Rule, adapt
from surm_jax.record import curves
from surm_jax.record.curves import draw_curves


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
    """All Matplotlib figures that were drawn so far in this test."""
    made = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(curves, "Figure", Kept)
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
