"""One update: loss and gradient by the trained arrays alone, in one compiled function."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from surm_jax.peft import adapter_dropout
from surm_jax.training.mesh import batch_sharding, replicated
from surm_jax.training.partition import Arrays, Partition

Batch = dict[str, jax.Array]


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


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Cross-entropy of each example, against labels that give `smoothing` of their mass to all classes alike."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def make_train_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the compiled update `(state, frozen, batch) -> (state, metrics)`. It takes over the memory of `state`.

    `metrics` has `train_loss` (mean over the batch), `train_accuracy` and `gradient_norm` (before clipping). Dropout is
    drawn from (seed, step, micro-batch), so a run that was resumed goes on as if it had not stopped.

    Args:
      partition: how trained and frozen arrays make the model; the model is called as `model(images, rngs=key)`.
      optimizer: what turns gradients into updates.
      mesh: the devices. The batch is split over its axis `data`.
      seed: of the dropout.
      accumulate: number of micro-batches; only one is worked on at a time. Must divide the batch.
      label_smoothing: see `cross_entropy`.
    """

    def loss_and_correct(trained: Arrays, frozen: nnx.State, batch: Batch, key: jax.Array):
        with adapter_dropout(jax.random.fold_in(key, 1)):
            logits = partition.merge(trained, frozen)(batch["image"], rngs=key)
        loss = cross_entropy(logits, batch["label"], label_smoothing).mean()
        return loss, (logits.argmax(-1) == batch["label"]).mean()

    gradient = jax.value_and_grad(loss_and_correct, has_aux=True)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            (loss, accuracy), gradients = gradient(state.trained, frozen, batch, key)
        else:
            micro_batches = jax.tree.map(lambda array: _micro_batches(array, accumulate), batch)

            def add(total, indexed):
                index, micro_batch = indexed
                part = gradient(state.trained, frozen, micro_batch, jax.random.fold_in(key, index))
                return jax.tree.map(lambda sum_, new: sum_ + new / accumulate, total, part), None

            first = jax.tree.map(lambda array: array[0], micro_batches)
            shapes = jax.eval_shape(gradient, state.trained, frozen, first, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            ((loss, accuracy), gradients), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), micro_batches))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"train_loss": loss, "train_accuracy": accuracy, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, trained, optimizer_state), metrics

    whole = replicated(mesh)
    return jax.jit(
        train_step, donate_argnums=0, in_shardings=(whole, whole, batch_sharding(mesh)), out_shardings=(whole, whole)
    )


def _micro_batches(array: jax.Array, count: int) -> jax.Array:
    # Every count-th example goes into the same micro-batch, so that each device keeps the examples it has.
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
