"""The metrics of predictions. The import takes a second, because scipy.stats and sklearn are large."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.stats
from sklearn import metrics

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
