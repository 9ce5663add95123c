"""The timed programs of one linear layer, forward and backward, with a structured update or without."""

from collections.abc import Iterable
from typing import Any

import jax

from surm_jax.structured import FAMILIES, StructuredMatrix, updated_matmul


def step(x: jax.Array, kernel: jax.Array, update: StructuredMatrix, dy: jax.Array, *, execution: str) -> Any:
    """Return the output, the gradient of the input and the gradients of the update."""
    y, pull = jax.vjp(lambda x, update: updated_matmul(x, kernel, update, execution=execution), x, update)
    return y, *pull(dy)


def frozen_step(x: jax.Array, kernel: jax.Array, update: None, dy: jax.Array) -> Any:
    """Return the output and the gradient of the input, without an update."""
    del update
    y, pull = jax.vjp(lambda x: x @ kernel, x)
    return y, *pull(dy)


def check_sizes(families: Iterable[str], width: int) -> None:
    """Check that every variant of the families exists for kernels of width x width.

    Raises:
        UserError: A variant does not exist; the message names it.
    """
    for family in families:
        for options in FAMILIES[family].typical_options((width, width)):
            FAMILIES[family].count((width, width), **options)


def random_update(family: str, width: int, options: dict[str, Any]) -> StructuredMatrix:
    """Return a member of a family with random parameters."""
    return FAMILIES[family].random((width, width), scale=0.02, **options)
