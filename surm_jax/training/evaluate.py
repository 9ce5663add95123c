"""Evaluation over a whole data set: every example once, padding left out."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from surm_jax.devices.mesh import put_batch, replicated, with_whole_base
from surm_jax.tasks.objective import Objective
from surm_jax.tasks.scores import SCORES
from surm_jax.training.partition import Arrays, Partition
from surm_jax.training.step import Batch, Forward

EvalStep = Callable[[Arrays, nnx.State, Batch], dict[str, jax.Array]]


def make_eval_step(partition: Partition, forward: Forward, objective: Objective, mesh: jax.sharding.Mesh) -> EvalStep:
    """Returns the compiled `(trained, frozen, batch) -> loss, prediction, label and mask of each example`."""

    def logits_of(trained: Arrays, frozen: nnx.State, batch: Batch) -> jax.Array:
        return forward(partition.merge(trained, frozen), batch, None)

    def eval_step(trained: Arrays, frozen: nnx.State, batch: Batch):
        logits = with_whole_base(logits_of, mesh)(trained, frozen, batch)
        return {
            "loss": objective.loss(logits, batch["label"], 0.0),
            "prediction": objective.predict(logits),
            "label": batch["label"],
            "mask": batch["mask"],
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
    """Returns the metrics (names in `surm_jax.tasks.scores.SCORES`), the mean `loss` and the number of `examples`.

    Metrics are those of all examples together, not means over batches. What the device computes stays there until the
    end. Two batches are in its memory at a time: while it works on one, the host brings the next.
    """
    outputs = []
    for batch in batches:
        outputs.append(eval_step(trained, frozen, put_batch(batch, mesh)))
        jax.block_until_ready(outputs[-2:-1])
    outputs = jax.device_get(outputs)
    every = {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
    kept = {name: values[every["mask"]] for name, values in every.items()}
    return {
        **{name: SCORES[name](kept["label"], kept["prediction"]) for name in metrics},
        "loss": float(kept["loss"].mean(dtype=np.float64)),
        "examples": len(kept["label"]),
    }
