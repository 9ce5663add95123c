"""Arrays whose parts lie on the devices of several processes."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns all numbers of an array on the host, those that only other processes have included.

    All processes must ask, array by array in the same order. What each has anyway is not sent. Costs one copy.

    >>> whole(jax.numpy.arange(3))
    array([0, 1, 2], dtype=int32)
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
