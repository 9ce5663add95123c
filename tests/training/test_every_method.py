"""Tests of the training step with every registered method.

On the digits, the loss falls, all trained arrays change, and all other arrays do not. Frozen weights have no gradient
and no state in the optimiser, and they are not returned by the training step. Eight devices that split the base model
and run its blocks in `jax.lax.scan` compute the same as one device that runs the blocks in a Python loop.
"""

import functools
import math

import jax
import numpy as np
import optax
import pytest

from benchmarks.hlo import collectives
from surm_jax.devices import mesh as meshes
from surm_jax.devices.mesh import make_mesh, put_base, put_batch
from surm_jax.peft import METHODS
from surm_jax.peft.methods.entrywise.abba import ProductPart
from surm_jax.peft.parts.base import iter_parts
from surm_jax.peft.parts.entrywise import EntrywisePart
from surm_jax.tasks.objective import CLASSES
from surm_jax.training.optimizer import Rates, make_optimizer
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.partition import partition
from surm_jax.training.step import init_state, make_train_step
from tests.speeds import fast
from tests.training import small, tiny

# Settings of methods whose default values do not fit a model of width 64 with two blocks, and learning rates with which
# the loss falls within a few steps.
VALUES = {
    "c3a": {"peft.c3a.block": 32},
    "adapter_drop": {"peft.adapter_drop.skip": 1},
    "lokr": {"peft.lokr.rank": 2},
    "structured": {"peft.structured.family": "CirculantPair + LowRank"},
}
RATES = {"c3a": 0.3, "mora": 1e-2, "full": 3e-3, "attention_only": 3e-3}


@functools.cache
def digits(method: str) -> tiny.Built:
    config = base_config()
    config.update_from_flattened_dict(
        {
            "model.variant": "digits",
            "model.checkpoint": "none",
            "model.depth": 2,
            "data.name": "digits_5to9",
            "data.augment": "none",
            "data.batch_size": 64,
            "mesh.data": 1,
            "peft.method": method,
            f"optim.learning_rate.{method}": RATES.get(method, 1e-2),
            "optim.decay": "constant",
            **VALUES.get(method, {}),
        }
    )
    with pytest.warns(UserWarning, match="RANDOM weights"):
        return tiny.build(parse(config))


KEY = jax.random.key(0)


@pytest.mark.parametrize("method", fast(METHODS, "circulant"))
def test_a_method_lowers_the_loss_and_moves_what_it_trains(method):
    built = digits(method)
    mesh = built.job.mesh
    optim, task = built.job.config.optim, built.job.task
    optimizer, rates = make_optimizer(optim, built.trained), Rates(optim, method, built.trained)
    step = make_train_step(built.partition, task.forward, task.objective, optimizer, mesh)
    batch = put_batch(tiny.batch_of(built, 64), mesh)
    start, frozen = tiny.host(built.trained), tiny.host(built.frozen)
    with jax.set_mesh(mesh):
        state, losses = init_state(built.trained, optimizer, mesh), []
        for number in range(12):
            state, metrics = step(state, built.frozen, batch, KEY, rates.before(number + 1))
            losses.append(float(metrics["train_loss"]))
            if number == 1:
                still = [path for path, array in tiny.host(state.trained).items() if np.array_equal(array, start[path])]
                assert not still
    assert losses[-1] < 0.9 * losses[0]
    tiny.assert_equal_bits(tiny.host(built.frozen), frozen)


@pytest.mark.parametrize(
    "method", fast(["circulant", "circulant_adapter", "dora", "lora_fix", "bitfit", "full"], "circulant")
)
def test_memory_holds_frozen_weights_once_and_trained_ones_three_times(method):
    built = digits(method)
    mesh = built.job.mesh
    optim, task = built.job.config.optim, built.job.task
    optimizer, rates = make_optimizer(optim, built.trained), Rates(optim, method, built.trained)
    with jax.set_mesh(mesh):
        state = init_state(built.trained, optimizer, mesh)
        batch = put_batch(tiny.batch_of(built, 64), mesh)
        step = make_train_step(built.partition, task.forward, task.objective, optimizer, mesh)
        lowered = step.lower(state, built.frozen, batch, KEY, rates.before(1))
        memory = lowered.compile().memory_analysis()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    trained = size(built.trained)
    # The state holds the trained arrays and two moments of each for Adam. The other leaves are counters.
    assert 0 < size(state) - 3 * trained < 100
    # Compare the sizes of the program's arguments and outputs. They are at most those of the arrays, because the
    # compiler may remove arguments that are not used.
    key_and_rates = jax.random.key_data(KEY).nbytes + size(rates.before(1))
    assert memory.argument_size_in_bytes <= size(state) + size(built.frozen) + size(batch) + key_and_rates
    pointers = 8 * len(jax.tree.leaves(state)) + 100  # The table of pointers to the outputs, and the metrics.
    assert memory.output_size_in_bytes - size(state) <= pointers
    if method != "full":
        largest = max(leaf.size for leaf in jax.tree.leaves(built.frozen))
        assert not [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.size >= largest]


def ten_steps(kind, method, mesh, scan):
    """Make ten training steps of a small model with plain gradient descent.

    Returns:
        - The loss and the gradient norm of each step.
        - The trained arrays before the first step and after each step.
        - The largest number of entries of gradients that exist at the same time. Where the blocks of the model are
          stacked and run by `jax.lax.scan`, only one block counts, because the gradients of the blocks are computed one
          after another. The gradient of an update that is computed entry by entry counts too.
        - The frozen state.
        - The collectives in the compiled program.
    """
    built, sgd = small.build(kind, method), optax.sgd(0.1)
    parts, trained, frozen = partition(built.model, built.adapter, scan_layers=scan)
    with jax.set_mesh(mesh):
        state, frozen, batch = init_state(trained, sgd, mesh), put_base(frozen, mesh), put_batch(built.batch, mesh)
        step = make_train_step(parts, built.forward, CLASSES, sgd, mesh).lower(state, frozen, batch, KEY, {}).compile()
        losses, arrays = [], [tiny.host(parts.by_block(state.trained))]
        for _ in range(10):
            state, metrics = step(state, frozen, batch, KEY, {})
            losses.append([float(metrics[name]) for name in ("train_loss", "gradient_norm")])
            arrays.append(tiny.host(parts.by_block(state.trained)))
    # The scan computes the gradients of a stack block by block. So divide the size of a stacked array by the number of
    # blocks.
    gradients = sum(slot.variable.size // len(slot.names) for slot in parts.slots)
    entrywise = [row.part for row in iter_parts(built.model) if isinstance(row.part, EntrywisePart | ProductPart)]
    gradients += sum(math.prod(part.shape) for part in entrywise) // small.DEPTH
    return np.array(losses), arrays, gradients, frozen, collectives(step.as_text())


@pytest.mark.parametrize(
    ("method", "kind"),
    fast(
        [
            *((method, "vit") for method in METHODS),
            *((method, "bert") for method in ("circulant", "dora", "bottleneck")),
        ],
        ("circulant", "vit"),
        unpack=True,
    ),
)
def test_eight_devices_compute_what_one_computes_and_exchange_gradients_and_weights_alone(kind, method, monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SPLIT", 200)
    losses, arrays, _, _, _ = ten_steps(kind, method, make_mesh(1, {}), scan=False)
    eight_losses, eight_arrays, gradients, frozen, found = ten_steps(kind, method, make_mesh(4, {}, fsdp=2), scan=True)
    np.testing.assert_allclose(eight_losses, losses, rtol=1e-6, atol=1e-6)
    # The first step subtracts 0.1 times the gradients from the arrays. Check that they are not tiny.
    assert max(np.abs(arrays[1][name] - start).max() for name, start in arrays[0].items()) > 1e-3
    tiny.assert_close(arrays[1], eight_arrays[1], 1e-6)
    tiny.assert_close(arrays[10], eight_arrays[10], 1e-6)
    weights = {
        leaf.size // (small.DEPTH if "stacked" in jax.tree_util.keystr(path) else 1)
        for path, leaf in jax.tree.leaves_with_path(frozen)
        if not leaf.sharding.is_fully_replicated
    }
    # All weights are smaller than the activations, so that the size of a gathered array shows which of the two it is.
    assert max(weights, default=0) < small.BATCH * 5 * 16
    assert {kind for kind, _, _ in found} == ({"all-reduce", "all-gather"} if weights else {"all-reduce"})
    assert {size for kind, sizes, _ in found for size in sizes if kind == "all-gather"} <= weights
    # The all-reduced arrays have more entries than the gradients of the head. They have at most as many entries as the
    # gradients that `ten_steps` has counted, the loss and a few scalars together.
    reduced = sum(size for kind, sizes, _ in found for size in sizes if kind == "all-reduce")
    assert 3 * 16 + 3 < reduced <= gradients + 4
