"""The two compiled functions of a run: the training step and the evaluation step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from surm_jax.devices.mesh import put_batch, replicated, with_whole_base
from surm_jax.peft import adapter_dropout
from surm_jax.tasks.base import Batch, Forward
from surm_jax.tasks.objective import PERPLEXITY, Objective
from surm_jax.training.partition import Arrays, Partition

Rates = Mapping[str, np.float32 | jax.Array]
"""The learning rates of one update, by optimiser group."""


class TrainState(NamedTuple):
    """The arrays that change during training. A checkpoint holds exactly these arrays.

    Attributes:
        step: The number of updates made so far, an int32 array of shape ().
        trained: The trained arrays by path.
        optimizer: The state of the optimiser.
    """

    step: jax.Array
    trained: Arrays
    optimizer: optax.OptState


TrainStep = Callable[[TrainState, nnx.State, Batch, jax.Array, Rates], tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[Arrays, nnx.State, Batch], dict[str, jax.Array]]


def init_state(trained: Arrays, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Return the training state before the first update, replicated on all devices of the mesh.

    The arrays are copied, because the training step donates its state and thereby deletes it.
    """
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
) -> Any:
    """Return the jitted training step, a `TrainStep`: `(state, frozen, batch, key, rates) -> (state, metrics)`.

    The step takes the training state, the frozen state of the model, a batch, the random key of the run, and the
    learning rate of each optimiser group. `state` is donated, so that its memory is reused for the result. `key` and
    `rates` are arguments, so that the compiled step does not depend on seed and schedule.

    `metrics` holds `train_loss` (the mean over all labels of the batch), `train_accuracy` (only for classification) and
    `gradient_norm` (the global norm before clipping). The dropout masks depend only on `key`, the step and the index of
    the micro-batch, so that a resumed run draws the same masks as an uninterrupted one.

    Args:
        partition: Puts trained arrays and frozen state together into the model.
        forward: A function `(model, batch, key) -> outputs`.
        objective: The loss, and the function that turns outputs into predictions.
        optimizer: Turns gradients into updates. If its method `update` takes extra keyword arguments, it gets `rates`.
        mesh: The device mesh. The training state and the key must be replicated, the frozen state sharded as by
            `surm_jax.devices.mesh.put_base`, and the batch sharded over all devices along its first axis.
        accumulate: The number of micro-batches into which each batch is split. It must divide the batch size. Their
            gradients are computed one after another and averaged, so that every label of the batch counts equally.
        label_smoothing: See `surm_jax.tasks.objective.cross_entropy`.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_and_rest(trained: Arrays, frozen: nnx.State, batch: Batch, key: jax.Array, count: jax.Array | float):
        # The model and the adapter each derive further keys from the key that they get. From the same key, they could
        # derive the same keys and draw the same dropout masks.
        model_key, adapter_key = jax.random.split(key)
        with adapter_dropout(adapter_key):
            outputs = forward(partition.merge(trained, frozen), batch, model_key)
        rest = {}
        if objective.classifies:
            rest["train_accuracy"] = (objective.predict(outputs) == batch["label"]).sum(dtype=jnp.float32) / count
        return objective.loss(outputs, batch["label"], label_smoothing).sum() / count, rest

    gradient = jax.value_and_grad(with_whole_base(loss_and_rest, mesh), has_aux=True)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch, key: jax.Array, rates: Rates):
        key = jax.random.fold_in(key, state.step)
        # Micro-batches may have unequal numbers of labels. Each is divided by the mean number.
        count = objective.num_labels(batch["label"]) / accumulate
        (loss, rest), gradients = _accumulated(gradient, accumulate)(state.trained, frozen, batch, key, count)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained, rates=rates)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"train_loss": loss, **rest, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, trained, optimizer_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=replicated(mesh))


def _accumulated(gradient: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return a version of `gradient` that splits the batch into micro-batches and averages their results.

    Args:
        gradient: A function `(trained, frozen, batch, key, count) -> result`, where the result is a pytree of arrays.
        count: The number of micro-batches.
    """
    if count == 1:
        return gradient

    def accumulated(trained: Arrays, frozen: nnx.State, batch: Batch, key: jax.Array, labels: Any) -> Any:
        micro_batches = jax.tree.map(lambda array: _micro_batches(array, count), batch)

        def add(total: Any, indexed: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, micro_batch = indexed
            part = gradient(trained, frozen, micro_batch, jax.random.fold_in(key, index), labels)
            return jax.tree.map(lambda sum_, new: sum_ + new / count, total, part), None

        first = jax.tree.map(lambda array: array[0], micro_batches)
        shapes = jax.eval_shape(gradient, trained, frozen, first, key, labels)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(count), micro_batches))[0]

    return accumulated


def _micro_batches(array: jax.Array, count: int) -> jax.Array:
    # The shape changes from (batch, ...) to (count, batch / count, ...). Each micro-batch takes every count-th example:
    # the batch is sharded along its first axis, and so no example has to move to another device.
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)


def make_eval_step(partition: Partition, forward: Forward, objective: Objective, mesh: jax.sharding.Mesh) -> EvalStep:
    """Return the jitted evaluation step `(trained, frozen, batch) -> outputs`, which runs the model without dropout.

    `outputs` is a dictionary of arrays. The `loss` of each row and its `mask`, which is False for padding, have the
    shape (batch,). The `prediction`, the `label` and `counts`, whether the label is to be predicted, have the shape of
    the labels.
    """

    def outputs_of(trained: Arrays, frozen: nnx.State, batch: Batch) -> Any:
        return forward(partition.merge(trained, frozen), batch, None)

    def eval_step(trained: Arrays, frozen: nnx.State, batch: Batch):
        outputs, labels, mask = with_whole_base(outputs_of, mesh)(trained, frozen, batch), batch["label"], batch["mask"]
        return {
            "loss": objective.loss(outputs, labels, 0.0),
            "prediction": objective.predict(outputs),
            "label": labels,
            "mask": mask,
            "counts": mask if objective.no_label is None else labels != objective.no_label,
        }

    return jax.jit(eval_step, out_shardings=replicated(mesh))


def evaluate(
    eval_step: EvalStep,
    trained: Arrays,
    frozen: nnx.State,
    batches: Iterable[dict[str, np.ndarray]],
    metrics: Sequence[str],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Evaluate a model on every example of a data set.

    The metrics are computed from all examples together, not as means over batches. Rows of padding are left out. While
    the devices compute one batch, the host prepares the next, so the devices hold at most two batches. The predictions
    are copied to the host at the end.

    Args:
        eval_step: The result of `make_eval_step`.
        trained: The trained arrays by path.
        frozen: The frozen state.
        batches: The batches of one pass over the data set.
        metrics: Names of the metrics, which are keys of `surm_jax.tasks.scores.SCORES`, or `PERPLEXITY`.
        mesh: The device mesh.

    Returns:
        The value of each metric, the mean `loss` over all labels, and the number of `examples`.
    """
    # A slow import, which would delay the first step of a run.
    from surm_jax.tasks.scores import SCORES

    outputs: list[dict[str, Any]] = []
    for batch in batches:
        outputs.append(eval_step(trained, frozen, put_batch(batch, mesh)))
        jax.block_until_ready(outputs[-2:-1])
    outputs = jax.device_get(outputs)
    chosen_by = {"loss": "mask", "prediction": "counts", "label": "counts"}
    losses, predictions, labels = (
        np.concatenate([output[name][output[by]] for output in outputs]) for name, by in chosen_by.items()
    )
    loss = float(losses.sum(dtype=np.float64) / len(labels))
    scores = {name: SCORES[name](labels, predictions) for name in metrics if name != PERPLEXITY}
    perplexity = {PERPLEXITY: float(np.exp(loss))} if PERPLEXITY in metrics else {}
    return {**scores, **perplexity, "loss": loss, "examples": len(losses)}
