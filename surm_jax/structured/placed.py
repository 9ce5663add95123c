"""A structured matrix as one block of a larger matrix of zeros, to update one part of a packed kernel.

A packed kernel holds several kernels side by side, such as those of query, key and value. A `Sum` of several `Placed`
matrices updates several of them. A `Placed` matrix has the arrays of the matrix inside it, under names such as
`matrix_c`.
"""

from collections.abc import Sequence
from typing import Self

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from surm_jax.errors import UserError
from surm_jax.structured.algebra import Composite
from surm_jax.structured.base import StructuredMatrix, checked_shape, matrix_pytree, static


@matrix_pytree
class Placed(Composite):
    """A matrix `P` that is zero except for one block, the structured matrix `M`.

    If `M` has m rows and begins at `(row, column)`, `x @ P` is `x[..., row : row + m] @ M`, padded with zeros on the
    left and right to the output features of `P`. This costs as much as the product with `M`, plus one copy for the
    padding.

    Attributes:
        matrix: The structured matrix `M`.
        shape: `(in_features, out_features)` of `P`.
        offset: `(row, column)` of the first entry of `M` in `P`.

    >>> from surm_jax.structured import Circulant
    >>> Placed(Circulant(jnp.array([1.0, 2.0]), shape=(2, 2)), shape=(2, 3), offset=(0, 1)).to_dense()
    Array([[0., 1., 2.],
           [0., 2., 1.]], dtype=float32)
    """

    matrix: StructuredMatrix
    shape: tuple[int, int] = static()
    offset: tuple[int, int] = static()

    def __post_init__(self) -> None:
        self._check_parts()
        m, n = checked_shape("Placed", self.shape)
        row, column = self.offset
        if self._has_shapes():
            rows, columns = self.matrix.shape
            if min(row, column) < 0 or row + rows > m or column + columns > n:
                raise UserError(
                    f"Placed: a block of {rows} x {columns} at ({row}, {column}) does not lie within {m} x {n}"
                )

    @property
    def T(self) -> "Placed":
        """The transpose: `M` is transposed, and the row and the column of its offset are exchanged."""
        return Placed(self.matrix.T, self.shape[::-1], self.offset[::-1])

    def _parts(self) -> dict[str, StructuredMatrix]:
        return {"matrix": self.matrix}

    def _with_parts(self, parts: Sequence[StructuredMatrix]) -> Self:
        return type(self)(parts[0], self.shape, self.offset)

    def _apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        (row, column), (rows, columns) = self.offset, self.matrix.shape
        y = self.matrix._apply(x[..., row : row + rows])
        return jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(column, self.shape[1] - column - columns)])

    def _dense(self) -> Float[Array, "in out"]:
        (row, column), (rows, columns) = self.offset, self.matrix.shape
        m, n = self.shape
        return jnp.pad(self.matrix._dense(), [(row, m - row - rows), (column, n - column - columns)])

    def _rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch out"]:
        (row, column), (rows, columns) = self.offset, self.matrix.shape
        found = self.matrix._rows(jnp.clip(ids - row, 0, rows - 1))
        found = jnp.where(((ids >= row) & (ids < row + rows))[..., None], found, 0)
        return jnp.pad(found, [(0, 0)] * ids.ndim + [(column, self.shape[1] - column - columns)])
