"""Rows of structured matrices, such as the embeddings of tokens, without their dense form."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

UNIT_ENTRIES = 2**19
"""The largest number of entries of the unit vectors that are multiplied by a matrix at the same time."""


def rows(matrix: Any, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
    """Return rows of a structured matrix, in float32 or float64.

    The cost is that of the family, such as one small product for a row of a low-rank matrix. By default, a family
    multiplies one unit vector for each row.

    Args:
        matrix: A structured matrix of shape (in_features, out_features).
        ids: The numbers of the rows, from 0 to in_features - 1, in an array of any shape.

    >>> from surm_jax.structured import Circulant
    >>> rows(Circulant(jnp.array([1.0, 2.0, 3.0]), shape=(3, 3)), jnp.array([1]))
    Array([[3., 1., 2.]], dtype=float32)
    """
    return matrix._astype(matrix._compute_dtype())._rows(jnp.asarray(ids))


def by_unit_vectors(
    apply: Callable[[Array], Array], shape: tuple[int, int], dtype: DTypeLike, ids: Int[Array, "*batch"]
) -> Float[Array, "*batch out"]:
    """Return rows of a matrix of a given shape by multiplying unit vectors, where `apply(x) = x @ M`."""
    m, n = shape
    if not math.prod(ids.shape):
        return jnp.zeros((*ids.shape, n), dtype)
    unit = lambda i: apply(jax.nn.one_hot(i, m, dtype=dtype))  # noqa: E731
    found = jax.lax.map(unit, ids.reshape(-1), batch_size=max(1, UNIT_ENTRIES // m))
    return found.reshape(*ids.shape, n)
