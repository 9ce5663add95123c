"""Functions for timing one linear layer: its forward and backward pass, with a structured update and without."""

from collections.abc import Iterable
from typing import Any

import jax

from surm_jax.structured import FAMILIES, StructuredMatrix, updated_matmul


def step(x: jax.Array, kernel: jax.Array, update: StructuredMatrix, dy: jax.Array, *, execution: str) -> Any:
    """Compute the forward and the backward pass of a linear layer with a structured update.

    Args:
        x: The input, (tokens, in_features).
        kernel: The frozen kernel, (in_features, out_features).
        update: The structured matrix that is added to the kernel.
        dy: The gradient with respect to the output, (tokens, out_features).
        execution: How the product with the update is computed, one of `EXECUTIONS`.

    Returns:
        The output, and the gradients with respect to the input and to the parameters of the update.
    """
    y, pull = jax.vjp(lambda x, update: updated_matmul(x, kernel, update, execution=execution), x, update)
    return y, *pull(dy)


def frozen_step(x: jax.Array, kernel: jax.Array, update: None, dy: jax.Array) -> Any:
    """Compute the forward and the backward pass of a frozen linear layer without an update.

    The arguments are the same as for `step`, except that the update is None.

    Returns:
        The output, and the gradient with respect to the input.
    """
    del update
    y, pull = jax.vjp(lambda x: x @ kernel, x)
    return y, *pull(dy)


def check_sizes(families: Iterable[str], width: int) -> None:
    """Check that each family has matrices of the shape (width, width), with all options that are timed.

    Raises:
        UserError: A family has no matrix of this shape with one of its options. The message tells why.
    """
    for family in families:
        for options in FAMILIES[family].typical_options((width, width)):
            FAMILIES[family].count((width, width), **options)


def random_update(family: str, width: int, options: dict[str, Any]) -> StructuredMatrix:
    """Return a matrix of a family with random parameters and the shape (width, width).

    Args:
        family: The name of the family.
        width: The number of rows and of columns.
        options: The options of the family, such as a rank.
    """
    return FAMILIES[family].random((width, width), scale=0.02, **options)
