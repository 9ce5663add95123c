"""Select parts of a training set: a few examples to train on, or held-out examples to choose settings with."""

from typing import Any, TypeVar

import numpy as np

from surm_jax.data.images.dataset import ImageSource, Subset
from surm_jax.data.text.dataset import TextSource
from surm_jax.errors import UserError

Source = TypeVar("Source", ImageSource, TextSource)


def first_examples(train: Source, count: int) -> Source:
    """Take the first `count` examples of a training set in a random order that is the same in every run.

    The examples for a larger `count` include those for a smaller one.

    Returns:
        These examples, in the order of the training set; all examples if `count` is 0.

    Raises:
        UserError: There are fewer examples.

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
    """Hold out `count` examples of a training set, the same in every run.

    Returns:
        The remaining training examples, and those held out (`None` if `count` is 0).

    Raises:
        UserError: No example would remain.

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
    indices = np.sort(indices)
    return source.select(indices) if isinstance(source, TextSource) else Subset(source, indices)
