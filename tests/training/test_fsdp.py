"""Tests of a base model that is split over devices (`config.mesh.fsdp`).

Training and evaluation give the same results with less memory, and only weights are gathered.
"""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.hlo import gathered_sizes
from surm_jax.devices import mesh as meshes
from surm_jax.devices.mesh import base_sharding, make_mesh, put_base, put_batch
from surm_jax.errors import UserError
from surm_jax.tasks import ImageClassification
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.partition import partition
from surm_jax.training.step import evaluate, init_state, make_eval_step, make_train_step
from tests.speeds import fast
from tests.training import small, tiny

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)


@pytest.fixture(autouse=True)
def split_small_arrays(monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SPLIT", 30)


def run(built, mesh, steps=3):
    step = make_train_step(built.partition, ImageClassification.forward, CLASSES, SGD, mesh)
    with jax.set_mesh(mesh):
        state, frozen = init_state(built.trained, SGD, mesh), put_base(built.frozen, mesh)
        batch = put_batch(tiny.batch_of(built), mesh)
        compiled = step.lower(state, frozen, batch, KEY, {}).compile()
        losses = []
        for _ in range(steps):
            state, metrics = compiled(state, frozen, batch, KEY, {})
            losses.append([float(metrics[name]) for name in ("train_loss", "gradient_norm")])
        return tiny.host(state.trained), np.array(losses), compiled, frozen


@pytest.mark.parametrize("method", fast(["circulant", "dora"], "circulant"))
def test_a_split_base_trains_as_a_whole_one(built_for, method):
    built = built_for(method)
    whole, losses, _, _ = run(built, make_mesh(1, {}))
    split, split_losses, compiled, frozen = run(built, make_mesh(4, {}, fsdp=2))
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    tiny.assert_close(whole, split, 3e-6)
    parts = [leaf for leaf in jax.tree.leaves(frozen) if not leaf.sharding.is_fully_replicated]
    assert parts
    # All gathered arrays have the sizes of weights. The activations are larger than that, so they are not gathered.
    sizes = {leaf.size for leaf in parts}
    gathered = gathered_sizes(compiled.as_text())
    assert gathered and set(gathered) <= sizes
    assert max(sizes) < 16 * 5 * 10


@pytest.mark.exhaustive
def test_arguments_take_less_memory_the_more_devices_share_the_base(built_for):
    built = built_for("circulant")
    sizes = [run(built, make_mesh(1, {}, fsdp), 1)[2].memory_analysis().argument_size_in_bytes for fsdp in (1, 2)]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(built.frozen))
    assert sizes[0] - sizes[1] > 0.3 * total


def memory(depth, scan):
    """Return the size of the temporary arrays of a training step on one device, and of the whole base model, in bytes.

    The base model is split over eight devices. Each example has only one token, so that the activations are small
    compared with the weights.

    Args:
        depth: The number of blocks.
        scan: Whether to stack the blocks and run them in `jax.lax.scan`.
    """
    built = small.build("bert", "lora", depth=depth, width=64, mlp_width=256, remat="block")
    mesh = make_mesh(1, {}, fsdp=8)
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=scan)
    batch = {name: array if name == "label" else array[:, :1] for name, array in built.batch.items()}
    with jax.set_mesh(mesh):
        state, frozen, batch = init_state(trained, SGD, mesh), put_base(frozen, mesh), put_batch(batch, mesh)
        step = make_train_step(parts, built.forward, CLASSES, SGD, mesh)
        compiled = step.lower(state, frozen, batch, KEY, {}).compile().memory_analysis()
    return compiled.temp_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))


@pytest.mark.exhaustive
def test_a_scan_gathers_one_layer_at_a_time():
    looped, few_layers = memory(6, scan=False)
    few, _ = memory(6, scan=True)
    many, many_layers = memory(24, scan=True)
    # In a program with a loop, the compiler sees all blocks at once and may gather the weights of all of them first.
    assert few < looped / 2
    assert many < many_layers / 3
    # In addition to the gathered weights of one block, each device holds a rearranged copy of its eighth of all blocks.
    # So the memory may grow by an eighth of the additional blocks, but not by a quarter.
    assert many - few < (many_layers - few_layers) / 4


def test_evaluation_of_a_split_base(built_for):
    built = built_for("circulant")
    measured = []
    for mesh in (make_mesh(1, {}), make_mesh(4, {}, fsdp=2)):
        with jax.set_mesh(mesh):
            step = make_eval_step(built.partition, ImageClassification.forward, CLASSES, mesh)
            batches = built.job.task.eval_batches("test")
            measured.append(evaluate(step, built.trained, put_base(built.frozen, mesh), batches, ("accuracy",), mesh))
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


def test_where_arrays_are_split():
    mesh = make_mesh(2, {}, fsdp=4)
    assert mesh.shape == {"data": 2, "fsdp": 4}
    assert base_sharding(mesh, (8, 12, 64)).spec == jax.P(None, None, "fsdp")
    assert base_sharding(mesh, (7, 12)).spec == jax.P(None, "fsdp")
    assert base_sharding(mesh, (12, 12)).spec == jax.P("fsdp")
    for shape in ((7, 9), (4, 4), ()):
        assert base_sharding(mesh, shape).is_fully_replicated


def test_stacked_layers_lie_as_each_of_them_does():
    mesh, parts = make_mesh(2, {}, fsdp=4), {}
    for scan in (False, True):
        built = small.build("vit", "lora", depth=4)
        graphdef, state = nnx.split(built.model)
        # A pretrained model is loaded with its arrays already split over the devices. Stacking must keep them split.
        model = nnx.merge(graphdef, put_base(state, mesh))
        with jax.set_mesh(mesh):
            _, _, frozen = partition(model, built.adapter, scan_layers=scan)
        for state in (frozen, put_base(frozen, mesh)):
            block = state["blocks"][0]["stacked"] if scan else state["blocks"][0]
            shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(block)]
            parts.setdefault(scan, []).append(shapes)
    assert parts[True] == [[(4, *shape) for shape in shapes] for shapes in parts[False]]
    assert (4, 16, 6) in parts[True][0]  # Four kernels `up` of shape (16, 24), whose last axis is split over 4 devices.


def test_zero_means_what_fsdp_leaves_over():
    assert make_mesh(0, {}, fsdp=4).shape == {"data": 2, "fsdp": 4}
    with pytest.raises(UserError, match=r"data=4 times fsdp=4.*\(8\)"):
        make_mesh(4, {}, fsdp=4)
