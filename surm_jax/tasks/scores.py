"""The metrics of a whole evaluation, from labels and predictions, by scikit-learn and SciPy."""

from collections.abc import Callable, Mapping

import numpy as np
import scipy.stats
from sklearn import metrics

Score = Callable[[np.ndarray, np.ndarray], float]


def _correlation(correlate: Callable) -> Score:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        # It is not defined where one side does not vary: a model that always says the same has learned nothing.
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(correlate(labels, predictions).statistic)

    return score


SCORES: Mapping[str, Score] = {
    "accuracy": lambda labels, predictions: float(metrics.accuracy_score(labels, predictions)),
    # Of class 1 in a task of two.
    "f1": lambda labels, predictions: float(metrics.f1_score(labels, predictions, zero_division=0.0)),
    "matthews": lambda labels, predictions: float(metrics.matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
}
"""Metrics by name: `(labels, predictions) -> float`, the larger the better. Correlations of a constant are 0."""
