"""One update: loss and gradient by the trained arrays alone, in one compiled function."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from surm_jax.devices.mesh import replicated, with_whole_base
from surm_jax.peft import adapter_dropout
from surm_jax.tasks.objective import Objective
from surm_jax.training.partition import Arrays, Partition

Batch = dict[str, jax.Array]
Forward = Callable[[nnx.Module, Batch, jax.Array | None], jax.Array]
"""`(model, batch, key of the dropout or None) -> logits`."""


class TrainState(NamedTuple):
    """All that changes while training, and all that a checkpoint holds of arrays.

    Attributes:
        step: number of updates made, int32.
        trained: the trained arrays by path.
        optimizer: optax's state for them.
    """

    step: jax.Array
    trained: Arrays
    optimizer: optax.OptState


def init_state(trained: Arrays, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state before the first update, on the mesh. The arrays are copies: the step may take them over."""
    trained = {path: jnp.array(array, copy=True) for path, array in trained.items()}
    return jax.device_put(TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained)), replicated(mesh))


def make_train_step(
    partition: Partition,
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
) -> Callable[
    [TrainState, nnx.State, Batch, jax.Array, Mapping[str, np.float32]], tuple[TrainState, dict[str, jax.Array]]
]:
    """Returns the compiled update `(state, frozen, batch, key, rates) -> (state, metrics)`.

    It takes over the memory of `state`. `key` is the run's, `rates` are the learning rates that the optimiser asks for:
    as arguments, they leave the program the same for every seed and schedule, so that it is compiled once. `metrics`
    has `train_loss` (mean over the batch), `train_accuracy` (of classes) and `gradient_norm` (before clipping). Dropout
    is drawn from (key, step, micro-batch), so a run that was resumed goes on as if it had not stopped.

    Args:
        partition: how trained and frozen arrays make the model.
        forward: how the model reads a batch.
        objective: what its outputs mean.
        optimizer: what turns gradients into updates; `rates` reach it as an extra argument, if it takes such.
        mesh: the devices. State and key are replicated, the base is where `surm_jax.devices.mesh.put_base` puts it, the
            batch is split over all devices.
        accumulate: number of micro-batches; only one is worked on at a time. Must divide the batch.
        label_smoothing: see `surm_jax.tasks.objective.cross_entropy`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_and_rest(trained: Arrays, frozen: nnx.State, batch: Batch, key: jax.Array):
        # Both draw further keys from theirs: from one key those would meet, and drop alike.
        model_key, adapter_key = jax.random.split(key)
        with adapter_dropout(adapter_key):
            logits = forward(partition.merge(trained, frozen), batch, model_key)
        rest = {}
        if objective.classifies:
            rest["train_accuracy"] = (objective.predict(logits) == batch["label"]).mean()
        return objective.loss(logits, batch["label"], label_smoothing).mean(), rest

    gradient = jax.value_and_grad(with_whole_base(loss_and_rest, mesh), has_aux=True)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch, key: jax.Array, rates: Mapping[str, np.float32]):
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            (loss, rest), gradients = gradient(state.trained, frozen, batch, key)
        else:
            micro_batches = jax.tree.map(lambda array: _micro_batches(array, accumulate), batch)

            def add(total, indexed):
                index, micro_batch = indexed
                part = gradient(state.trained, frozen, micro_batch, jax.random.fold_in(key, index))
                return jax.tree.map(lambda sum_, new: sum_ + new / accumulate, total, part), None

            first = jax.tree.map(lambda array: array[0], micro_batches)
            shapes = jax.eval_shape(gradient, state.trained, frozen, first, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            ((loss, rest), gradients), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), micro_batches))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained, rates=rates)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"train_loss": loss, **rest, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, trained, optimizer_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=replicated(mesh))


def _micro_batches(array: jax.Array, count: int) -> jax.Array:
    # Every count-th example goes into the same micro-batch, so that each device keeps the examples it has.
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
