"""What the outputs of a model mean: scores of classes, or a number. And how a prediction is judged."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Objective(NamedTuple):
    """How a model's outputs are trained and read.

    Attributes:
        loss: `(logits, labels, smoothing)` to the loss of each example, float32 (batch,).
        predict: logits to the prediction of each example, (batch,).
        classifies: whether a prediction is a class, and not a number.
    """

    loss: Callable[[jax.Array, jax.Array, float], jax.Array]
    predict: Callable[[jax.Array], jax.Array]
    classifies: bool


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Cross-entropy of each example, against labels that give `smoothing` of their mass to all classes alike."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def squared_error(
    logits: Float[Array, "batch 1"], labels: Float[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Squared distance of each example's one output from its label; there is nothing to smooth."""
    del smoothing
    return jnp.square(logits[:, 0] - labels)


CLASSES = Objective(cross_entropy, lambda logits: logits.argmax(-1), classifies=True)
NUMBER = Objective(squared_error, lambda logits: logits[:, 0], classifies=False)
