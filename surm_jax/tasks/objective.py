"""What the outputs of a model mean: their loss, the prediction that they make, and the scores of predictions."""

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
    """The loss of a model's outputs, and the prediction that they make.

    Attributes:
        loss: The function `(logits, labels, smoothing) -> loss of each example`, float32 (batch,).
        predict: The function `logits -> prediction of each example`, (batch,).
        classifies: Whether predictions are classes. Otherwise they are real numbers.
    """

    loss: Callable[[Any, Any, float], jax.Array]
    predict: Callable[[Any], jax.Array]
    classifies: bool


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Return the cross-entropy of each example.

    `smoothing` is the fraction of the probability of each label that is spread evenly over all classes.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def squared_error(
    logits: Float[Array, "batch 1"], labels: Float[Array, "batch"], smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Return the squared difference between the output and the label of each example. `smoothing` has no effect."""
    del smoothing
    return jnp.square(logits[:, 0] - labels)


CLASSES = Objective(cross_entropy, lambda logits: logits.argmax(-1), classifies=True)
NUMBER = Objective(squared_error, lambda logits: logits[:, 0], classifies=False)

Score = Callable[[np.ndarray, np.ndarray], float]


def _correlation(correlate: Callable[..., Any]) -> Score:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        # The correlation with a constant is undefined. Return 0: a constant prediction has learned nothing.
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
"""The metrics of an evaluation by name: `(labels, predictions) -> float`. Larger is better. The correlation with a
constant counts as 0."""
