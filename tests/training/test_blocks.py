"""Tests of stacked blocks.

Blocks that run in `jax.lax.scan` compute the same as in a Python loop, and the program does not grow with their number.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from surm_jax.devices.mesh import make_mesh
from surm_jax.models import Blocks
from surm_jax.peft import adapter_dropout, load_adapter
from surm_jax.record.progress import Interruption
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.blocks import Stack, StepBlocks
from surm_jax.training.config import OptimConfig
from surm_jax.training.loop import train
from surm_jax.training.modes import evaluate_run
from surm_jax.training.optimizer import make_optimizer
from surm_jax.training.partition import partition
from surm_jax.training.setup import prepare
from surm_jax.training.step import init_state, make_train_step
from tests.speeds import fast
from tests.training import small, tiny

KEY = jax.random.key(4)


def loss_and_gradients(built: small.Small, scan: bool, key: jax.Array | None = None) -> tuple[float, dict]:
    """Return the loss of a model and its gradients by path, with separate gradients for each block.

    Args:
        built: The model and a batch.
        scan: Whether to stack equal blocks and run them in `jax.lax.scan`.
        key: The key for dropout, or None for no dropout.
    """
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=scan)

    def loss(trained, frozen):
        with adapter_dropout(key):
            logits = built.forward(parts.merge(trained, frozen), built.batch, key)
        return CLASSES.loss(logits, built.batch["label"], 0.0).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained, frozen)
    return float(value), tiny.host(parts.by_block(gradients))


def assert_same(looped, scanned):
    assert scanned[0] == pytest.approx(looped[0], rel=1e-6)
    assert max(np.abs(gradient).max() for gradient in looped[1].values()) > 1e-2
    tiny.assert_close(looped[1], scanned[1], 1e-6)


@pytest.mark.parametrize("kind", fast(small.KINDS, "vit"))
@pytest.mark.parametrize(
    "method",
    fast(["circulant", "lora", "dora", "bottleneck", "norm_tuning", "full"], "circulant", "bottleneck"),
)
def test_values_and_gradients_are_those_of_a_loop(kind, method):
    looped, scanned = (loss_and_gradients(small.build(kind, method), scan) for scan in (False, True))
    assert_same(looped, scanned)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", fast(small.KINDS, "bert"))
@pytest.mark.parametrize(
    ("method", "remat"),
    [
        pytest.param("lora", "none", marks=pytest.mark.exhaustive),
        pytest.param("bottleneck", "block", marks=pytest.mark.exhaustive),
        ("lora", "dots"),
    ],
)
def test_dropout_draws_the_same_keys(kind, method, remat):
    values = {f"peft.{method}.dropout": 0.3}
    options = {"dropout": 0.2, "remat": remat}
    looped, scanned = (
        loss_and_gradients(small.build(kind, method, values, **options), scan, KEY) for scan in (False, True)
    )
    assert_same(looped, scanned)


@pytest.mark.exhaustive
@pytest.mark.parametrize("remat", fast(["none", "block"], "block"))
def test_bfloat16(remat):
    with jax.numpy_dtype_promotion("standard"):  # The gradient of jax.nn.dot_product_attention needs it.
        looped, scanned = (
            loss_and_gradients(small.build("bert", "circulant", remat=remat, dtype="bfloat16"), scan)
            for scan in (False, True)
        )
    assert scanned[0] == pytest.approx(looped[0], rel=1e-2)
    assert all(gradient.any() for gradient in looped[1].values())
    tiny.assert_near(looped[1], scanned[1], 2e-2)


@pytest.mark.parametrize("kind", fast(small.KINDS, "vit"))
def test_states_of_every_layer(kind):
    arguments = {"vit": ("image",), "bert": ("tokens",)}[kind]
    states = {}
    for scan in (False, True):
        built = small.build(kind, "linear_probe", depth=3)
        parts, trained, frozen = partition(built.model, built.adapter, scan_layers=scan)
        inputs = [built.batch[name] for name in arguments]
        states[scan] = jax.jit(lambda t, f: parts.merge(t, f).hidden_states(*inputs))(trained, frozen)  # noqa: B023
    assert len(states[True]) == len(states[False]) == 4
    for one, other in zip(*states.values(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def kinds(blocks):
    assert type(blocks) is StepBlocks
    return [part.depth if isinstance(part, Stack) else 1 for part in blocks]


@pytest.mark.exhaustive
def test_blocks_that_differ_are_not_stacked():
    built = small.build("vit", "adapter_drop", depth=4)
    looped = loss_and_gradients(small.build("vit", "adapter_drop", depth=4), False)
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=True)
    # The first block has no adapter.
    assert kinds(parts.merge(trained, frozen).blocks) == [1, 3]
    assert_same(looped, loss_and_gradients(small.build("vit", "adapter_drop", depth=4), True))


def test_blocks_in_different_groups_of_the_optimiser_are_not_stacked():
    built = small.build("vit", "lora", depth=4)
    group_of = lambda path: path.startswith(("blocks/0/", "blocks/1/"))  # noqa: E731
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=True, group_of=group_of)
    assert kinds(parts.merge(trained, frozen).blocks) == [2, 2]
    names = {slot.names for slot in parts.slots}
    path = "attention/query/delta/default/up"
    assert {(f"blocks/0/{path}", f"blocks/1/{path}"), (f"blocks/2/{path}", f"blocks/3/{path}")} <= names


def test_the_model_comes_back_bit_for_bit():
    built, same = small.build("bert", "circulant", depth=3), small.build("bert", "circulant", depth=3)
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=True)
    on_devices = len(jax.live_arrays())
    model = parts.model(trained, frozen)
    # The stack still exists, so the device memory might not hold all blocks a second time. They must be on the host.
    assert len(jax.live_arrays()) <= on_devices
    assert type(model.blocks) is Blocks
    assert nnx.graphdef(model) == nnx.graphdef(same.model)
    tiny.assert_equal_bits(tiny.host(nnx.state(model)), tiny.host(nnx.state(same.model)))


def test_the_base_is_never_twice_in_memory():
    built = small.build("vit", "lora", depth=3)
    held = jax.tree.leaves(nnx.state(built.model.blocks))
    others = jax.tree.leaves((nnx.state(built.model.head), nnx.state(built.model.patch_embed)))
    partition(built.model, built.adapter, scan_layers=True)
    assert all(array.is_deleted() for array in held)
    assert not any(array.is_deleted() for array in others)


def test_states_of_training_are_the_same_in_files():
    """Check that a checkpoint, with the optimiser's moments, does not depend on whether blocks are stacked."""
    states = {}
    for scan in (False, True):
        built = small.build("vit", "lora", depth=3)
        parts, trained, _ = partition(built.model, built.adapter, scan_layers=scan)
        optimizer = make_optimizer(OptimConfig(), trained)
        # The second moments `nu` are zero at first. Replace them by the squares of the trained arrays, so that those of
        # different blocks differ.
        state = optax.tree_utils.tree_set(optimizer.init(trained), nu=jax.tree.map(jnp.square, trained))
        states[scan] = parts.by_block({"trained": trained, "optimizer": state})
        back = parts.by_step(states[scan])
        tiny.assert_equal_bits(tiny.host(back), tiny.host({"trained": trained, "optimizer": state}))
    assert jax.tree.structure(states[True]) == jax.tree.structure(states[False])
    tiny.assert_equal_bits(tiny.host(states[True]), tiny.host(states[False]))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*RANDOM weights")
def test_a_run_goes_on_in_a_loop_where_it_was_in_a_scan(tiny_files, tmp_path):
    def run(scan, folder):
        values = {"model.checkpoint": "none", "model.depth": 2, "mesh.data": 1, "log.checkpoint_every": 2}
        config = tiny.make_config(tiny_files, "lora", **values, **{"model.scan_layers": scan})
        with Interruption() as interruption:
            return config, train(config, 0, folder, interruption)

    config, looped = run(False, tmp_path / "looped")
    _, scanned = run(True, tmp_path / "scanned")
    assert scanned["metrics"] == looped["metrics"]
    assert evaluate_run(tmp_path / "scanned", {})[0]["test"]["accuracy"] == scanned["metrics"]["test_accuracy"]
    # Delete the last checkpoint and the result, so that the next start resumes from the previous one.
    (tmp_path / "scanned" / "result.json").unlink()
    shutil.rmtree(tmp_path / "scanned" / "checkpoints" / "4")
    run(False, tmp_path / "scanned")
    leaves = [tiny.read_checkpoints(tmp_path / name)[4][0] for name in ("looped", "scanned")]
    tiny.assert_close(*leaves, 1e-6)
    # The adapters of both runs can be loaded into a model without stacked blocks.
    job = prepare(config, 0)
    logits = []
    for name in ("looped", "scanned"):
        model, _ = load_adapter(tmp_path / name / "adapter", job.base_model())
        logits.append(jax.jit(lambda images: model(images))(jnp.ones((2, 8, 8, 1))))  # noqa: B023
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)


def program_size(depth, scan):
    """Return the number of lines of a compiled training step with AdamW, in StableHLO.

    Args:
        depth: The number of blocks of the model.
        scan: Whether to stack the blocks and run them in `jax.lax.scan`.
    """
    built = small.build("vit", "circulant", depth=depth, width=4, mlp_width=4)
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=scan)
    mesh, rates = make_mesh(1, {}), {"adapter": np.float32(0.1), "head": np.float32(0.1)}
    optimizer = make_optimizer(OptimConfig(), trained)
    state = init_state(trained, optimizer, mesh)
    step = make_train_step(parts, built.forward, CLASSES, optimizer, mesh)
    with jax.set_mesh(mesh):
        return len(step.lower(state, frozen, built.batch, KEY, rates).as_text().splitlines())


@pytest.mark.exhaustive
def test_the_program_does_not_grow_with_depth():
    assert program_size(3, True) == program_size(6, True)
    assert program_size(4, False) > 1.5 * program_size(2, False)
