"""The programs that are timed: one linear layer, forward and backward, with a structured update or without."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surm_jax.structured import FAMILIES, StructuredMatrix, updated_matmul

#: What `init` needs besides the shape, for each variant of a family that is timed.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "LowRank": ({"rank": 1},),
    "LowDisplacementRank": ({"rank": 1}, {"rank": 4}),
    "FCirculant": ({"f": 0.5},),
    "BlockCirculant": ({"block": 128},),
    "LowRankKronecker": ({"rank": 1},),
    "Tiled": ({"side": 39}, {"side": 38, "rotate": True}),
}


def step(x: jax.Array, kernel: jax.Array, update: StructuredMatrix, dy: jax.Array, *, execution: str) -> Any:
    """Output, gradient of the input, gradients of the update."""
    y, pull = jax.vjp(lambda x, update: updated_matmul(x, kernel, update, execution=execution), x, update)
    return y, *pull(dy)


def frozen_step(x: jax.Array, kernel: jax.Array, update: None, dy: jax.Array) -> Any:
    """Output and gradient of the input of the kernel alone."""
    del update
    y, pull = jax.vjp(lambda x: x @ kernel, x)
    return y, *pull(dy)


def check_sizes(families: Iterable[str], width: int) -> None:
    """Checks, before anything is timed, that every variant of the families exists for kernels of width x width.

    Raises:
        UserError: One does not; the message names it.
    """
    for family in families:
        for options in VARIANTS.get(family, ({},)):
            jax.eval_shape(
                lambda family=family, options=options: FAMILIES[family].init(
                    jax.random.key(0), (width, width), scale=1.0, **options
                )
            )


def random_update(family: str, width: int, options: dict[str, Any]) -> StructuredMatrix:
    """A member with all parameters random."""
    start = FAMILIES[family].init(jax.random.key(0), (width, width), scale=1.0, **options)
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(scale=0.02, size=leaf.shape), leaf.dtype), start)
