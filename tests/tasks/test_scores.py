import numpy as np
import pytest

from surm_jax.data import GLUE_TASKS
from surm_jax.tasks.scores import SCORES

CONSTANT = ("f1", "matthews", "pearson", "spearman")


def counts(labels, predictions):
    """Count the true positives, false positives, true negatives and false negatives of class 1."""
    return [
        int(np.sum((labels == label) & (predictions == prediction)))
        for label, prediction in ((1, 1), (0, 1), (0, 0), (1, 0))
    ]


def correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def ranks(values):
    """Return the rank of each value, counted from 1. Equal values all get the mean of their ranks."""
    below = (values[None] < values[:, None]).sum(1)
    same = (values[None] == values[:, None]).sum(1)
    return below + (same + 1) / 2


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_classes(seed):
    rng = np.random.default_rng(seed)
    labels, predictions = (rng.integers(0, 2, 50) for _ in range(2))
    tp, fp, tn, fn = counts(labels, predictions)
    assert min(tp, fp, tn, fn) > 0
    assert SCORES["accuracy"](labels, predictions) == pytest.approx((tp + tn) / 50)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert SCORES["f1"](labels, predictions) == pytest.approx(2 * precision * recall / (precision + recall))
    spread = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert SCORES["matthews"](labels, predictions) == pytest.approx((tp * tn - fp * fn) / spread)


def test_accuracy_of_three_classes():
    assert SCORES["accuracy"](np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1])) == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_correlations(seed):
    rng = np.random.default_rng(seed)
    # Round the labels to multiples of 0.25. As in STS-B, some of them are then equal and share their rank.
    labels = np.round(rng.uniform(0, 5, 40) * 4).astype(np.float32) / 4
    predictions = (np.exp(labels) + rng.normal(0, 30, 40)).astype(np.float32)
    assert len(set(labels)) < 40
    # Labels and predictions are float32, as in a run.
    assert SCORES["pearson"](labels, predictions) == pytest.approx(correlation(labels, predictions), rel=1e-5)
    assert SCORES["spearman"](labels, predictions) == pytest.approx(correlation(ranks(labels), ranks(predictions)))
    assert SCORES["spearman"](labels, np.exp(labels)) == pytest.approx(1)
    assert SCORES["pearson"](labels, 2 - 3 * labels) == pytest.approx(-1)


@pytest.mark.parametrize("name", CONSTANT)
def test_who_always_says_the_same_scores_nothing(name, recwarn):
    labels = np.array([0, 1, 1, 0, 1])
    scores = [
        SCORES[name](labels, np.zeros(5)),
        SCORES[name](np.zeros(5), labels),
        SCORES[name](labels[:1], labels[:1] + 1),
    ]
    if name != "f1":
        scores.append(SCORES[name](labels, np.ones(5)))
    assert scores == [0.0] * len(scores)
    assert all(type(score) is float for score in scores)
    assert not recwarn.list


def test_every_metric_of_glue_is_there():
    assert {metric for task in GLUE_TASKS.values() for metric in task.metrics} == SCORES.keys()
