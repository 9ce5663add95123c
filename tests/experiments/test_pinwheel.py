"""Tests of the pinwheel experiment: its points and networks, its training loop against optax, and the whole command."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import pinwheel
from experiments import pinwheel_networks as networks


@pytest.fixture
def adam():
    """Allow implicit dtype promotion, which Adam needs and `tests/conftest.py` forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def points():
    return networks.pinwheel(np.random.default_rng(0), 40)


def test_points_lie_on_their_spokes(points):
    assert points.x.shape == (200, 2)
    assert points.x.dtype == np.float32
    assert np.bincount(points.labels).tolist() == [40] * 5
    spoke = points.x[:, 0] + 1j * points.x[:, 1]
    # Undo the rotation that bends the spokes, and the one that turns each spoke. Then all points lie around (1, 0).
    back = spoke * np.exp(-1j * (2 * np.pi * points.labels / 5 + np.exp(np.abs(spoke)) / 4))
    assert abs(back.real.mean() - 1) < 0.1
    assert 0.2 < back.real.std() < 0.4
    assert abs(back.imag.mean()) < 0.03
    assert back.imag.std() < 0.15


@pytest.mark.parametrize(
    ("layer", "numbers"),
    [("dense", 4096), ("lora", 128), ("circulant", 128), ("symmetric_toeplitz", 128), ("toeplitz", 127)],
)
def test_layers_start_alike(layer, numbers):
    mine, dense = ([networks.start(name, seed) for seed in range(20)] for name in (layer, "dense"))
    assert mine[0].hidden.num_params == numbers
    entries = np.stack(jax.jit(jax.vmap(lambda matrix: matrix.to_dense()))(networks.starts(layer, range(20)).hidden))
    np.testing.assert_allclose(entries.var(), 1 / 64, rtol=0.15)
    for one, other in zip(mine, dense, strict=True):
        for name in ("bottom", "bottom_bias", "hidden_bias", "top", "top_bias"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert not np.array_equal(mine[0].bottom, mine[1].bottom)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("adam")
def test_training_is_that_of_optax(points):
    epochs, rate = 6, 0.01
    stack, losses = networks.train(
        networks.starts("circulant", [0, 1]), jnp.full(2, rate), jnp.array([0.0, 1.0]), points, epochs=epochs
    )
    network = networks.start("circulant", 1)

    def loss(network):
        matrix = network.hidden.to_dense()
        hidden = jnp.tanh(points.x @ network.bottom + network.bottom_bias[None])
        hidden = jnp.tanh(hidden @ matrix + network.hidden_bias[None])
        scores = jax.nn.log_softmax(hidden @ network.top + network.top_bias[None])
        return -scores[jnp.arange(len(points.labels)), points.labels].mean()

    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs))
    state, expected = optimizer.init(network), []
    for _ in range(epochs):
        value, gradient = loss_and_gradient(network)
        expected.append(value)
        updates, state = optimizer.update(gradient, state)
        network = optax.apply_updates(network, updates)
    np.testing.assert_allclose(losses[1], expected, rtol=1e-4)
    np.testing.assert_allclose(stack.hidden.r1[1], network.hidden.r1, atol=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("adam")
def test_a_frozen_bottom_stays_and_all_else_moves(points):
    before = networks.starts("toeplitz", [0, 0])
    after, _ = networks.train(before, jnp.full(2, 0.01), jnp.array([0.0, 1.0]), points, epochs=2)
    moved = {
        jax.tree_util.keystr(path): np.asarray(leaf).reshape(2, -1).any(axis=1).tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.not_equal, after, before))
    }
    assert moved == {
        ".bottom": [False, True],
        ".bottom_bias": [False, True],
        ".hidden.t": [True, True],
        ".hidden_bias": [True, True],
        ".top": [True, True],
        ".top_bias": [True, True],
    }


def test_the_rate_is_chosen_on_held_out_points():
    trials = [
        pinwheel.Trial("lora", "frozen", 0.1, 0.0, 0.5),
        pinwheel.Trial("lora", "frozen", 0.2, 0.1, 0.3),
        pinwheel.Trial("lora", "trained", 0.3, 0.0, 0.1),
        pinwheel.Trial("dense", "frozen", 0.4, 0.0, 0.1),
    ]
    assert pinwheel.best_rate(trials, "lora", "frozen") == 0.2


@pytest.mark.exhaustive
@pytest.mark.usefixtures("adam")
def test_the_whole_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(pinwheel, "LAYERS", {name: pinwheel.LAYERS[name] for name in ("dense", "lora", "toeplitz")})
    monkeypatch.setattr(pinwheel, "EPOCHS", 3)
    monkeypatch.setattr(pinwheel, "SEEDS", (0, 1))
    monkeypatch.setattr(pinwheel, "SEARCH_SEEDS", (10,))
    monkeypatch.setattr(pinwheel, "RATES", (1e-3, 1e-2, 1e-1, 1.0))
    pinwheel.main([f"--out={tmp_path}"])
    with (tmp_path / "pinwheel.csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = [(layer, bottom, seed) for layer in pinwheel.LAYERS for bottom in ("frozen", "trained") for seed in "01"]
    assert [(row["layer"], row["bottom"], row["seed"]) for row in rows] == cells
    assert all(0 < float(row["cka"]) < 1 for row in rows)
    assert all(0 < float(row["test_loss"]) < 3 for row in rows)
    # A dense network is compared with that of the next seed. With two seeds, each is the next one of the other, so both
    # have the same CKA.
    assert rows[0]["cka"] == rows[1]["cka"] != rows[2]["cka"]
    text = "\n".join(pinwheel.tables(tmp_path).values())
    assert text.count("| toeplitz | 127 |") == 2
    assert text.count("**") == 2 * len(pinwheel.LAYERS) * 2
    for name in ("pinwheel.png", "pinwheel_regions.png"):
        assert (tmp_path / name).stat().st_size > 20_000
