"""What the outputs of a model mean: how they are trained, how a prediction is read, and how predictions are scored."""

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
    """How the outputs of a model are trained and read.

    Attributes:
        loss: `(logits, labels, smoothing)` to the loss of each example, float32 (batch,).
        predict: Logits to the prediction of each example, (batch,).
        classifies: Whether a prediction is a class. Otherwise it is a number.
    """

    loss: Callable[[Any, Any, float], jax.Array]
    predict: Callable[[Any], jax.Array]
    classifies: bool


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Return the cross-entropy of each example.

    `smoothing` is the share of a label's mass that is spread evenly over all classes.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def squared_error(
    logits: Float[Array, "batch 1"], labels: Float[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Return the squared difference of each example's one output and its label. `smoothing` has no effect."""
    del smoothing
    return jnp.square(logits[:, 0] - labels)


CLASSES = Objective(cross_entropy, lambda logits: logits.argmax(-1), classifies=True)
NUMBER = Objective(squared_error, lambda logits: logits[:, 0], classifies=False)

Score = Callable[[np.ndarray, np.ndarray], float]


def _correlation(correlate: Callable[..., Any]) -> Score:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        # A correlation is undefined if one side is constant. A model that always says the same has learned nothing.
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
"""Metrics of a whole evaluation by name: `(labels, predictions) -> float`. Larger is better. Correlations with a
constant are 0."""
