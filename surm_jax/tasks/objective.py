"""The losses for training, and the functions that turn outputs into predictions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Objective(NamedTuple):
    """The loss of a model's outputs, and the function that turns these outputs into predictions.

    Attributes:
        loss: A function `(outputs, labels, smoothing) -> losses`. The losses are float32 of shape (batch,). If a row of
            the batch has several labels, its loss is their sum.
        predict: A function `outputs -> predictions`. The predictions have the shape of the labels.
        classifies: Whether the predictions are indices of classes. Otherwise they are real numbers.
        no_label: The label of what is not to be predicted, or None if every label counts.
    """

    loss: Callable[[Any, Any, float], jax.Array]
    predict: Callable[[Any], jax.Array]
    classifies: bool
    no_label: int | None = None

    def num_labels(self, labels: jax.Array) -> jax.Array | float:
        """Return the number of labels that are to be predicted, by which a sum of losses is divided for the mean."""
        return float(labels.size) if self.no_label is None else (labels != self.no_label).sum(dtype=jnp.float32)


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Return the cross-entropy of each example.

    Args:
        logits: The outputs of the model.
        labels: The class of each example, as an index.
        smoothing: Label smoothing: the fraction of each label's probability that is spread evenly over all classes.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def squared_error(
    logits: Float[Array, "batch 1"], labels: Float[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Return the squared difference between the output and the label of each example.

    All losses take the argument `smoothing`. It has no effect here.
    """
    del smoothing
    return jnp.square(logits[:, 0] - labels)


class TokenLosses(NamedTuple):
    """The loss of every token to be written, 0 where there is none, and the most probable token at every place."""

    losses: Float[Array, "batch tokens"]
    predictions: Int[Array, "batch tokens"]


def token_losses(
    logits_of: Callable[[jax.Array], jax.Array],
    features: Float[Array, "batch tokens width"],
    labels: Int[Array, "batch tokens"],
    *,
    no_label: int,
    at_once: int = 1024,
) -> TokenLosses:
    """Return the cross-entropy of every label, without the logits of all tokens ever being in memory.

    The logits of a large vocabulary take more memory than all else. So they are computed for some tokens of every row
    after the others, and computed again in the backward pass.

    Args:
        logits_of: A function from features to logits, such as `surm_jax.models.Decoder.logits`.
        features: What the head of the model reads.
        labels: The next token at every place, or `no_label`.
        no_label: The label of places without a loss.
        at_once: The number of tokens, over all rows, for which logits are in memory at the same time.
    """
    batch, tokens, _ = features.shape
    size = min(tokens, max(1, at_once // batch))
    parts = -(-tokens // size)
    more = (0, parts * size - tokens)

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(batch, parts, size, *array.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def losses_of(features: jax.Array, labels: jax.Array) -> TokenLosses:
        logits, counts = logits_of(features), labels != no_label
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
        return TokenLosses(jnp.where(counts, losses, 0), logits.argmax(-1).astype(labels.dtype))

    inputs = (
        split(jnp.pad(features, ((0, 0), more, (0, 0)))),
        split(jnp.pad(labels, ((0, 0), more), constant_values=no_label)),
    )
    _, found = jax.lax.scan(lambda _, part: (None, losses_of(*part)), None, inputs)
    return TokenLosses(*(array.swapaxes(0, 1).reshape(batch, -1)[:, :tokens] for array in found))


CLASSES = Objective(cross_entropy, lambda logits: logits.argmax(-1), classifies=True)
NUMBER = Objective(squared_error, lambda logits: logits[:, 0], classifies=False)

PERPLEXITY = "perplexity"
"""The name of the metric exp(loss), which is computed from the mean loss and not from predictions."""
