"""The timed programs of one linear layer, forward and backward, with a structured update or without."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surm_jax.structured import FAMILIES, StructuredMatrix, updated_matmul

#: The options of the variants that are timed, for families that have options.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "LowRank": ({"rank": 1},),
    "LowDisplacementRank": ({"rank": 1}, {"rank": 4}),
    "FCirculant": ({"f": 0.5},),
    "BlockCirculant": ({"block": 128},),
    "LowRankKronecker": ({"rank": 1},),
    "Tiled": ({"side": 39}, {"side": 38, "rotate": True}),
}


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
        for options in VARIANTS.get(family, ({},)):
            jax.eval_shape(
                lambda family=family, options=options: FAMILIES[family].init(
                    jax.random.key(0), (width, width), scale=1.0, **options
                )
            )


def random_update(family: str, width: int, options: dict[str, Any]) -> StructuredMatrix:
    """Return a member of a family with random parameters."""
    start = FAMILIES[family].init(jax.random.key(0), (width, width), scale=1.0, **options)
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(scale=0.02, size=leaf.shape), leaf.dtype), start)
