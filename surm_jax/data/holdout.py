"""Training examples that are set aside, to choose settings by."""

import functools
from typing import TypeVar

import numpy as np

from surm_jax.data.dataset import ImageSource, Subset
from surm_jax.data.text_dataset import TextSource
from surm_jax.errors import UserError

Source = TypeVar("Source", ImageSource, TextSource)


def hold_out(train: Source, count: int) -> tuple[Source, Source | None]:
    """Takes `count` examples out of a training set, the same ones in every run.

    Returns:
        The training examples that are left, and those held out (None if `count` is 0).

    Raises:
        UserError: fewer than one would be left.

    >>> from surm_jax.data import ArraySource
    >>> left, held_out = hold_out(ArraySource(np.zeros((5, 4, 4, 1), np.uint8), np.arange(5)), 2)
    >>> len(left), len(held_out)
    (3, 2)
    """
    if count == 0:
        return train, None
    if not 0 < count < len(train):
        raise UserError(f"cannot hold out {count} examples of {len(train)}: at least one must be left to train on")
    order = np.random.default_rng(0).permutation(len(train))
    select = train.select if isinstance(train, TextSource) else functools.partial(Subset, train)
    return select(np.sort(order[count:])), select(np.sort(order[:count]))
