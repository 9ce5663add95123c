"""Select random examples of a training set, to train on a few examples or to hold some out.

Held-out examples are used to choose hyperparameters without the test set.
"""

import functools
from collections.abc import Sized
from typing import Any, TypeVar

import numpy as np

from surm_jax.data.images.dataset import Subset
from surm_jax.errors import UserError

Source = TypeVar("Source", bound=Sized)
"""A sequence of examples. It may have a method `select(indices)`. Otherwise it is an `ImageSource`."""


def first_examples(train: Source, count: int) -> Source:
    """Return `count` random examples of a training set, the same in every run.

    The examples for a larger `count` include those for a smaller one.

    Returns:
        These examples, in the order of the training set. If `count` is 0, all examples are returned.

    Raises:
        UserError: `count` is negative, or the training set has fewer examples.

    The label of each of these 8 examples is its index. The examples 2 and 4 are selected for both counts:

    >>> from surm_jax.data import ArraySource
    >>> source = ArraySource(np.zeros((8, 4, 4, 1), np.uint8), np.arange(8))
    >>> first_examples(source, 2).labels.tolist(), first_examples(source, 4).labels.tolist()
    ([2, 4], [2, 3, 4, 6])
    """
    if count == 0:
        return train
    if not 0 < count <= len(train):
        raise UserError(f"cannot train on {count} examples: there are {len(train)}")
    return _select(train, _order(len(train))[:count])


def hold_out(train: Source, count: int) -> tuple[Source, Source | None]:
    """Split a training set into examples to train on and `count` random examples that are held out.

    The split is the same in every run.

    Returns:
        The remaining training examples and the held-out examples. If `count` is 0, the second value is `None`.

    Raises:
        UserError: `count` is negative, or no example would remain.

    In the example, 2 of 5 examples are held out:

    >>> from surm_jax.data import ArraySource
    >>> left, held_out = hold_out(ArraySource(np.zeros((5, 4, 4, 1), np.uint8), np.arange(5)), 2)
    >>> len(left), len(held_out)
    (3, 2)
    """
    if count == 0:
        return train, None
    if not 0 < count < len(train):
        raise UserError(f"cannot hold out {count} examples of {len(train)}: at least one must be left to train on")
    order = _order(len(train))
    return _select(train, order[count:]), _select(train, order[:count])


def _order(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


def _select(source: Any, indices: np.ndarray) -> Any:
    return getattr(source, "select", functools.partial(Subset, source))(np.sort(indices))
