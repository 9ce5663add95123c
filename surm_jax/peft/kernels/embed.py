"""The kernels of `nnx.Embed`. The table of embeddings is a matrix of shape (tokens, features).

Looking up a token is the product of a unit vector and this matrix, so an update adds the row of its own matrix, without
its dense form (`surm_jax.structured.rows`). `attend` multiplies by the transposed table, updates included. Many
language models use it as their head.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from surm_jax.peft.kernels.base import KINDS, AdaptedLayer, Kind, constant_kernel, kernel_parts, probed
from surm_jax.peft.kernels.contraction import Layout
from surm_jax.structured import matmul


class AdaptedEmbed(AdaptedLayer):
    """An `nnx.Embed` whose table includes what adapters add."""

    def __call__(self, inputs: Int[Array, "*batch"], *args: Any, **kwargs: Any) -> Float[Array, "*batch features"]:
        """Return the embeddings of tokens, plus the rows of the updates."""
        y = super(AdaptedEmbed, constant_kernel(self, "embedding")).__call__(inputs, *args, **kwargs)  # type: ignore[misc]
        table: Any = vars(self)["embedding"]
        count = table.shape[0]
        # As in `nnx.Embed`, negative numbers count from the end. A table of one row gives it for every number.
        ids = jnp.where(inputs < 0, inputs + count, inputs) if count > 1 else jnp.zeros_like(inputs)
        terms = [part.rows(ids, y, probed(table[...])) for part in kernel_parts(self)]
        return sum(terms, start=y)

    def attend(
        self, query: Float[Array, "*batch features"], *args: Any, **kwargs: Any
    ) -> Float[Array, "*batch tokens"]:
        """Return the products of queries and all embeddings, updates included. This product has no dropout."""
        y = super(AdaptedEmbed, constant_kernel(self, "embedding")).attend(query, *args, **kwargs)  # type: ignore[misc]
        query = query.astype(y.dtype)
        for part in kernel_parts(self):
            matrix = part.plain_matrix()
            if matrix is not None:
                term = matmul(query, matrix.T, execution=part.execution)
            else:
                term = query @ part.change(probed(vars(self)["embedding"][...])).T.astype(query.dtype)
            y = y + term.astype(y.dtype)
        return y


class EmbedKind(Kind):
    """How `nnx.Embed` multiplies by its table."""

    parameter = "embedding"
    mixin = AdaptedEmbed
    calls = ("__call__", "attend")

    def layout(self, module: Any) -> Layout:
        """Return the layout of a table of shape (num_embeddings, features)."""
        return Layout((module.num_embeddings, module.features), (0,), (1,))

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the number of features."""
        return (module.features,)


KINDS[nnx.Embed] = EmbedKind()
