"""The losses for training, the functions that turn logits into predictions, and the metrics of predictions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jaxtyping import Array, Float, Int
from sklearn import metrics


class Objective(NamedTuple):
    """The loss of a model's outputs, and the function that turns these outputs into predictions.

    Attributes:
        loss: A function `(logits, labels, smoothing) -> losses`. The losses are float32 of shape (batch,).
        predict: A function `logits -> predictions`. The predictions have the shape (batch,).
        classifies: Whether the predictions are indices of classes. Otherwise they are real numbers.
    """

    loss: Callable[[Any, Any, float], jax.Array]
    predict: Callable[[Any], jax.Array]
    classifies: bool


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


CLASSES = Objective(cross_entropy, lambda logits: logits.argmax(-1), classifies=True)
NUMBER = Objective(squared_error, lambda logits: logits[:, 0], classifies=False)

Score = Callable[[np.ndarray, np.ndarray], float]


def _correlation(correlate: Callable[..., Any]) -> Score:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        # The correlation with a constant is undefined. Return 0, because a model with constant predictions has learned
        # nothing.
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(correlate(labels, predictions).statistic)

    return score


SCORES: Mapping[str, Score] = {
    "accuracy": lambda labels, predictions: float(metrics.accuracy_score(labels, predictions)),
    # For two classes: the F1 score of class 1.
    "f1": lambda labels, predictions: float(metrics.f1_score(labels, predictions, zero_division=0.0)),
    "matthews": lambda labels, predictions: float(metrics.matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
}
"""The metrics by name, as functions `(labels, predictions) -> float`. Larger values are better. A correlation with
constant labels or predictions is 0."""
