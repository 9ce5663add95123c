"""The LoRA-style update: a linear layer computes `x @ (W + sum of alpha * M)` with structured matrices M.

`UpdatePart` is one such matrix with its factor, and `NormalizedPart` brings the columns of the sum to learned lengths,
as DoRA does. `StoredMatrix` holds a structured matrix as a module, for these and for branches.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.parts.base import AdapterConstant, AdapterParam, KernelPart
from surm_jax.peft.parts.dropout import drop, drops
from surm_jax.structured import (
    Dot,
    Family,
    Placed,
    Product,
    StructuredMatrix,
    Sum,
    check_execution,
    matmul,
    refine,
)


class StoredMatrix(nnx.Module):
    """A structured matrix as a module: its arrays are variables under the names that the matrix gives them.

    Args:
        matrix: The matrix, of shape (in_features, out_features).
        frozen: Names of arrays that are not trained. For an array of a composite, such as `terms_0_down`, the last
            word counts.
    """

    def __init__(self, matrix: StructuredMatrix, frozen: Collection[str] = ()) -> None:
        self.frozen = tuple(frozen)
        self._keep(matrix)

    def _keep(self, matrix: StructuredMatrix) -> None:
        arrays = matrix.arrays()
        self.names = tuple(arrays)
        nothing: dict[str, Any] = dict.fromkeys(arrays)
        # The matrix without numbers: its family and its static sizes.
        self.empty = nnx.static(matrix.with_arrays(**nothing))
        for name, array in arrays.items():
            kind = AdapterConstant if name.rpartition("_")[2] in self.frozen else AdapterParam
            setattr(self, name, kind(array))

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's (in_features, out_features)."""
        return self.stored().shape

    @property
    def kind(self) -> str:
        """The family of the matrix."""
        return type(self.stored()).__name__

    def form(self) -> str:
        """Return the matrix with the shapes of its arrays."""
        return repr(self.stored())

    def stored(self) -> StructuredMatrix:
        """Return the matrix with its present numbers."""
        return self.empty.with_arrays(**{name: getattr(self, name).get_value() for name in self.names})

    def compact(self) -> None:
        """Replace the matrix, in place, by its smallest form."""
        smaller = self.stored().compact()
        for name in self.names:
            delattr(self, name)
        self._keep(smaller)


class UpdatePart(StoredMatrix, KernelPart):
    """A structured update of one kernel: it adds `x @ (factor * alpha * M)`.

    Args:
        matrix: The matrix M, of shape (in_features, out_features).
        kernel: The layer's kernel, of the same shape, which subclasses start from.
        factor: The fixed factor of M.
        alpha: First value of a trained factor; `None`: there is none.
        dropout: Probability of zeroing an entry of the part's input while training.
        frozen: Names of the matrix's arrays that are not trained.
        execution: How the product is computed, one of `surm_jax.structured.EXECUTIONS`.
    """

    reads_kernel = False

    def __init__(
        self,
        matrix: StructuredMatrix,
        kernel: Float[Array, "in out"],
        *,
        factor: float = 1.0,
        alpha: float | None = None,
        dropout: float = 0.0,
        frozen: Collection[str] = (),
        execution: str = "auto",
    ) -> None:
        del kernel
        check_execution(execution)
        KernelPart.__init__(self)
        StoredMatrix.__init__(self, matrix, frozen)
        self.factor, self.dropout, self.execution = factor, dropout, execution
        if alpha is not None:
            self.alpha = AdapterParam(jnp.asarray(alpha, jnp.float32))

    def plain_matrix(self) -> StructuredMatrix | None:
        """Return the scaled update, unless the part drops in this call."""
        return None if self.dropout and drops() else self.matrix(self.scale[...])

    def matrix(self, scale: float | Array = 1.0) -> StructuredMatrix:
        """Return `scale * factor * alpha * M`, as a multiple of the smallest form of M.

        Files hold that form, so that a loaded update computes the same bits.
        """
        alpha = self.alpha[...] if hasattr(self, "alpha") else 1.0
        return self.stored().compact().absorb(self.factor * alpha * scale)

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Return the factor, alpha included, and M."""
        return self.factor * (float(self.alpha[...]) if hasattr(self, "alpha") else 1.0), self.stored()

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Set M to the matrix of its family and sizes that is nearest to `target / factor`, and a trained alpha to 1.

        Raises:
            UserError: If the family cannot have these sizes.
        """
        self.compact()
        nearest = _nearest_like(self.stored(), jnp.asarray(target) / self.factor)
        if hasattr(self, "alpha"):
            self.alpha[...] = jnp.ones((), jnp.float32)
        for name, array in nearest.arrays().items():
            getattr(self, name)[...] = array
        return self.factor * np.asarray(nearest.to_dense())

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> "ServedUpdate":
        """Return the update with all factors multiplied out."""
        return ServedUpdate(self.matrix(self.scale[...]), None)

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        return self.matrix().to_dense().astype(jnp.float32)

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        return self._moved(x, self.matrix(), dot).astype(y.dtype)

    def _moved(self, x: Array, matrix: StructuredMatrix, dot: Dot) -> Array:
        return matmul(drop(x, self.dropout), matrix, execution=self.execution, dot=dot)


class NormalizedPart(UpdatePart):
    """An update after which every column of the kernel has a learned length (DoRA, arXiv 2402.09353, equation 5).

    The layer computes `m * x @ (W + dW) / ||W + dW||`, with the norms of columns, one for each output feature. They
    count as constants in gradients (section 4.3). `magnitude`, the m of the formula, starts at the norms of W.
    """

    reads_kernel = True

    def __init__(self, matrix: StructuredMatrix, kernel: Float[Array, "in out"], **settings: Any) -> None:
        super().__init__(matrix, kernel, **settings)
        self.magnitude = AdapterParam(_norms(kernel.astype(jnp.float32)))

    def plain_matrix(self) -> None:
        """Return `None`: the output also depends on the kernel."""
        return

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Refuse: the part is no multiple of a matrix.

        Raises:
            UserError: Always.
        """
        raise UserError("has learned magnitudes (DoRA), which are not a multiple of one matrix")

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Refuse: no search is known.

        Raises:
            UserError: Always.
        """
        raise UserError("it normalises the kernel's columns, and no nearest one to a given change is known")

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> "ServedUpdate":
        """Return the update with the factors of the columns computed."""
        if kernel is None:
            raise TypeError("the factors of the columns need the kernel")
        matrix = self.matrix()
        served = ServedUpdate(matrix, self._gain(kernel, matrix.to_dense()))
        served.scale[...] = self.scale[...]
        return served

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        kernel, dense = kernel.astype(jnp.float32), self.matrix().to_dense().astype(jnp.float32)
        return self._gain(kernel, dense)[None, :] * (kernel + dense) - kernel

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        matrix = self.matrix()
        moved = self._moved(x, matrix, dot).astype(y.dtype)
        return _gained(self._gain(kernel, matrix.to_dense()), y, y + moved)

    def _gain(self, kernel: Float[Array, "in out"], dense: Float[Array, "in out"]) -> Float[Array, "out"]:
        """Return the float32 factors of the columns of `kernel + dense`; a column of zeros stays zero."""
        norms = jax.lax.stop_gradient(_norms(kernel.astype(jnp.float32) + dense.astype(jnp.float32)))
        return self.magnitude[...] / jnp.where(norms == 0, 1.0, norms)


class ServedUpdate(StoredMatrix, KernelPart):
    """An update in a bank: a matrix, and for DoRA the factors of the kernel's columns.

    Args:
        matrix: What is added to the kernel, all factors included.
        gain: Factors of the columns of the kernel with the update, (out,); `None`: there are none.
    """

    def __init__(self, matrix: StructuredMatrix, gain: Float[Array, "out"] | None) -> None:
        KernelPart.__init__(self)
        StoredMatrix.__init__(self, matrix)
        if gain is not None:
            self.gain = AdapterConstant(gain)

    @classmethod
    def alike(cls, parts: Sequence["ServedUpdate"]) -> Sequence["ServedUpdate"]:
        """Return the updates with factors of 1 where only others have factors."""
        if any(hasattr(part, "gain") for part in parts):
            for part in parts:
                if not hasattr(part, "gain"):
                    part.gain = AdapterConstant(jnp.ones(part.shape[1], jnp.float32))
        return parts

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        moved = self.stored().apply(x).astype(jnp.float32)
        return _gained(self.gain[...], y, y.astype(jnp.float32) + moved) if hasattr(self, "gain") else moved


def _gained(gain: Float[Array, "out"], y: Float[Array, "*batch out"], moved: Array) -> Float[Array, "*batch out"]:
    """Return `gain * moved - y` in float32."""
    gain = jnp.expand_dims(gain, tuple(range(y.ndim - 1)))
    return gain * moved.astype(jnp.float32) - y.astype(jnp.float32)


def _norms(kernel: Float[Array, "in out"]) -> Float[Array, "out"]:
    """Return the Euclidean norm of every column, which is one output feature."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=0))


def _nearest_like(matrix: StructuredMatrix, dense: Float[Array, "in out"]) -> StructuredMatrix:
    """Return the matrix of the same family, sizes and blocks that is nearest to `dense`.

    For a product, or a sum whose terms overlap, it is the nearest one that a search finds.
    """
    if isinstance(matrix, Sum):
        terms: list[StructuredMatrix] = []
        for term in matrix.terms:
            terms.append(_nearest_like(term, dense - sum(found.to_dense() for found in terms)))
        blocks = all(isinstance(term, Placed) for term in terms)  # blocks of one kernel do not overlap
        return Sum(tuple(terms)) if blocks else refine(Sum(tuple(terms)), dense)
    if isinstance(matrix, Product):
        return refine(matrix, dense)
    if isinstance(matrix, Placed):
        (row, column), (rows, columns) = matrix.offset, matrix.matrix.shape
        block = dense[row : row + rows, column : column + columns]
        return Placed(_nearest_like(matrix.matrix, block), matrix.shape, matrix.offset)
    if not isinstance(matrix, Family):
        raise UserError(f"a {type(matrix).__name__} is no family with a nearest matrix")
    return matrix.nearest(dense, **matrix.options())
