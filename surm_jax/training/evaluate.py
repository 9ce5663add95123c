"""Evaluation over a whole data set: every example once, padding masked."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.training.mesh import batch_sharding, put_batch, replicated
from surm_jax.training.partition import Arrays, Partition
from surm_jax.training.step import Batch, cross_entropy

EvalStep = Callable[[dict[str, jax.Array], Arrays, nnx.State, Batch], dict[str, jax.Array]]


def make_eval_step(partition: Partition, mesh: jax.sharding.Mesh) -> EvalStep:
    """Returns the compiled `(sums, trained, frozen, batch) -> sums` for `evaluate`."""

    def eval_step(sums: dict[str, jax.Array], trained: Arrays, frozen: nnx.State, batch: Batch):
        logits = partition.merge(trained, frozen)(batch["image"])
        mask = batch["mask"]
        losses = jnp.where(mask, cross_entropy(logits, batch["label"]), 0)
        return {
            "loss": sums["loss"] + losses.sum(),
            "correct": sums["correct"] + (mask & (logits.argmax(-1) == batch["label"])).sum(),
            "examples": sums["examples"] + mask.sum(),
        }

    whole = replicated(mesh)
    return jax.jit(eval_step, in_shardings=(whole, whole, whole, batch_sharding(mesh)), out_shardings=whole)


def evaluate(
    eval_step: EvalStep,
    trained: Arrays,
    frozen: nnx.State,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Returns `accuracy`, mean `loss` and the number of `examples` over all batches.

    The sums stay on the device until the end: one transfer for the whole set.
    """
    sums = {"loss": jnp.zeros(()), "correct": jnp.zeros((), jnp.int32), "examples": jnp.zeros((), jnp.int32)}
    sums = jax.device_put(sums, replicated(mesh))
    for batch in batches:
        sums = eval_step(sums, trained, frozen, put_batch(batch, mesh))
    totals = jax.device_get(sums)
    examples = int(totals["examples"])
    return {
        "accuracy": int(totals["correct"]) / examples,
        "loss": float(totals["loss"]) / examples,
        "examples": examples,
    }
