"""A base that is split over devices: the same numbers, less memory for arguments, and nothing gathered but weights."""

import jax
import numpy as np
import optax
import pytest

from surm_jax.errors import UserError
from surm_jax.training import mesh as meshes
from surm_jax.training.evaluate import evaluate, make_eval_step
from surm_jax.training.image_task import ImageTask
from surm_jax.training.mesh import base_sharding, make_mesh, put_base, put_batch
from surm_jax.training.objective import CLASSES
from surm_jax.training.step import init_state, make_train_step
from tests.structured.hlo import gathered_sizes
from tests.training import tiny

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)


@pytest.fixture(autouse=True)
def split_small_arrays(monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SPLIT", 30)


def run(built, mesh, steps=3):
    step = make_train_step(built.partition, ImageTask.forward, CLASSES, SGD, mesh)
    with jax.set_mesh(mesh):
        state, frozen = init_state(built.trained, SGD, mesh), put_base(built.frozen, mesh)
        batch = put_batch(tiny.batch_of(built), mesh)
        compiled = step.lower(state, frozen, batch, KEY, {}).compile()
        losses = []
        for _ in range(steps):
            state, metrics = compiled(state, frozen, batch, KEY, {})
            losses.append([float(metrics[name]) for name in ("train_loss", "gradient_norm")])
        return tiny.host(state.trained), np.array(losses), compiled, frozen


@pytest.mark.parametrize("method", ["circulant", "lora", "dora", "bottleneck", "linear_probe"])
def test_a_split_base_trains_as_a_whole_one(built_for, method):
    built = built_for(method)
    whole, losses, _, _ = run(built, make_mesh(1, {}))
    split, split_losses, compiled, frozen = run(built, make_mesh(4, {}, fsdp=2))
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    tiny.assert_close(whole, split, 3e-6)
    parts = [leaf for leaf in jax.tree.leaves(frozen) if not leaf.sharding.is_fully_replicated]
    assert parts
    # What is gathered is a weight, and not as large as the activations.
    sizes = {leaf.size for leaf in parts}
    gathered = gathered_sizes(compiled.as_text())
    assert gathered and set(gathered) <= sizes
    assert max(sizes) < 16 * 5 * 10


def test_arguments_take_less_memory_the_more_devices_share_the_base(built_for):
    built = built_for("circulant")
    sizes = [run(built, make_mesh(1, {}, fsdp), 1)[2].memory_analysis().argument_size_in_bytes for fsdp in (1, 2)]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(built.frozen))
    assert sizes[0] - sizes[1] > 0.3 * total


def test_evaluation_of_a_split_base(built_for):
    built = built_for("circulant")
    measured = []
    for mesh in (make_mesh(1, {}), make_mesh(4, {}, fsdp=2)):
        with jax.set_mesh(mesh):
            step = make_eval_step(built.partition, ImageTask.forward, CLASSES, mesh)
            batches = built.job.task.eval_batches("test")
            measured.append(evaluate(step, built.trained, put_base(built.frozen, mesh), batches, ("accuracy",), mesh))
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


def test_where_arrays_are_split():
    mesh = make_mesh(2, {}, fsdp=4)
    assert mesh.shape == {"data": 2, "fsdp": 4}
    assert base_sharding(mesh, (8, 12, 64)).spec == jax.P(None, None, "fsdp")
    assert base_sharding(mesh, (7, 12)).spec == jax.P(None, "fsdp")
    for shape in ((7, 9), (4, 4), ()):
        assert base_sharding(mesh, shape).is_fully_replicated


def test_zero_means_what_fsdp_leaves_over():
    assert make_mesh(0, {}, fsdp=4).shape == {"data": 2, "fsdp": 4}
    with pytest.raises(UserError, match=r"data=4 times fsdp=4.*\(8\)"):
        make_mesh(4, {}, fsdp=4)
