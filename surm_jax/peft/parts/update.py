"""Updates of kernels: a linear layer computes `x @ (W + sum of alpha * M)` with structured matrices M.

`UpdatePart` holds one such matrix with its factor. `NormalizedPart` also rescales the columns of the updated kernel to
learned lengths, as in DoRA. `StoredMatrix` stores a structured matrix as a module, for updates and for branches.
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
    rows,
)


class StoredMatrix(nnx.Module):
    """A module that stores a structured matrix. Each array of the matrix is a variable of the same name.

    Args:
        matrix: The matrix, of shape (in_features, out_features).
        frozen: The names of arrays that are not trained. An array of a sum or product, such as `terms_0_down`, is
            identified by the last word of its name.
    """

    def __init__(self, matrix: StructuredMatrix, frozen: Collection[str] = ()) -> None:
        self.frozen = tuple(frozen)
        self._keep(matrix)

    def _keep(self, matrix: StructuredMatrix) -> None:
        arrays = matrix.arrays()
        self.names = tuple(arrays)
        nothing: dict[str, Any] = dict.fromkeys(arrays)
        # This is the matrix with `None` in place of its arrays. It has only the family and the static fields.
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
        """The name of the matrix's family, such as "LowRank", for tables."""
        return type(self.stored()).__name__

    def form(self) -> str:
        """Return a description of the matrix for messages, with the shapes of its arrays."""
        return repr(self.stored())

    def stored(self) -> StructuredMatrix:
        """Return the matrix with the current values of its arrays."""
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
        kernel: The layer's kernel, of the same shape. Only subclasses use it.
        factor: The fixed factor of M.
        alpha: The initial value of a trained factor. `None` means that there is no trained factor.
        dropout: The probability of zeroing an entry of the part's input during training.
        frozen: The names of the matrix's arrays that are not trained.
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
        """Return the matrix of the update with all factors, or `None` if the part uses dropout in this call."""
        return None if self.dropout and drops() else self.matrix(self.scale[...])

    def matrix(self, scale: float | Array = 1.0) -> StructuredMatrix:
        """Return the whole matrix that is added, `scale * factor * alpha * M`, from the smallest form of M.

        Adapter files store the smallest form, so that a loaded update computes the same bits as the saved one.
        """
        alpha = self.alpha[...] if hasattr(self, "alpha") else 1.0
        return self.stored().compact().absorb(self.factor * alpha * scale)

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Return the factor of M, including a trained alpha, and M."""
        return self.factor * (float(self.alpha[...]) if hasattr(self, "alpha") else 1.0), self.stored()

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Set M to the matrix of its family that is nearest to `target / factor`, and a trained alpha to 1.

        The sizes of M, such as its rank, stay the same.

        Raises:
            UserError: If the family has no nearest matrix of these sizes.
        """
        self.compact()
        nearest = _nearest_like(self.stored(), jnp.asarray(target) / self.factor)
        if hasattr(self, "alpha"):
            self.alpha[...] = jnp.ones((), jnp.float32)
        for name, array in nearest.arrays().items():
            getattr(self, name)[...] = array
        return self.factor * np.asarray(nearest.to_dense())

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> "ServedUpdate":
        """Return the update with all factors multiplied into its matrix."""
        return ServedUpdate(self.matrix(self.scale[...]), None)

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        return self.matrix().to_dense().astype(jnp.float32)

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        return self._moved(x, self.matrix(), dot).astype(y.dtype)

    def _rows(self, ids: Array, y: Array, kernel: Array) -> Array:
        return self._moved_rows(ids, self.matrix()).astype(y.dtype)

    def _moved_rows(self, ids: Array, matrix: StructuredMatrix) -> Array:
        # The input of the part is a unit vector for each token, of which dropout keeps or drops the one.
        return drop(jnp.ones((*ids.shape, 1), jnp.float32), self.dropout) * rows(matrix, ids)

    def _moved(self, x: Array, matrix: StructuredMatrix, dot: Dot) -> Array:
        return matmul(drop(x, self.dropout), matrix, execution=self.execution, dot=dot)


class NormalizedPart(UpdatePart):
    """An update that also gives each column of the kernel a learned length (DoRA, arXiv 2402.09353, equation 5).

    The layer computes `m * x @ (W + dW) / ||W + dW||`. The norms are those of columns, one for each output feature, and
    gradients treat them as constants (section 4.3). The parameter `magnitude` is m, and starts at the norms of W.
    """

    reads_kernel = True

    def __init__(self, matrix: StructuredMatrix, kernel: Float[Array, "in out"], **settings: Any) -> None:
        super().__init__(matrix, kernel, **settings)
        self.magnitude = AdapterParam(_norms(kernel.astype(jnp.float32)))

    def plain_matrix(self) -> None:
        """Return `None`, because what is added also depends on the kernel."""
        return

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Raise an error, because the part is not a multiple of one matrix.

        Raises:
            UserError: Always.
        """
        raise UserError("has learned magnitudes (DoRA), which are not a multiple of one matrix")

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Raise an error, because no method to find the nearest part is implemented.

        Raises:
            UserError: Always.
        """
        raise UserError("it normalises the kernel's columns, and cannot be fitted to a given change")

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> "ServedUpdate":
        """Return the update, with the factors of the updated kernel's columns computed in advance."""
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

    def _rows(self, ids: Array, y: Array, kernel: Array) -> Array:
        matrix = self.matrix()
        moved = self._moved_rows(ids, matrix).astype(y.dtype)
        return _gained(self._gain(kernel, matrix.to_dense()), y, y + moved)

    def _gain(self, kernel: Float[Array, "in out"], dense: Float[Array, "in out"]) -> Float[Array, "out"]:
        """Return the factor m / norm of each column of `kernel + dense`, in float32. A column of zeros stays zero."""
        norms = jax.lax.stop_gradient(_norms(kernel.astype(jnp.float32) + dense.astype(jnp.float32)))
        return self.magnitude[...] / jnp.where(norms == 0, 1.0, norms)


class ServedUpdate(StoredMatrix, KernelPart):
    """An update in the form that a bank stacks: a matrix and, for DoRA, the factors of the kernel's columns.

    Args:
        matrix: The matrix that is added to the kernel, all factors included.
        gain: The factors of the columns of the updated kernel, (out,). `None` means that there are no factors.
    """

    def __init__(self, matrix: StructuredMatrix, gain: Float[Array, "out"] | None) -> None:
        KernelPart.__init__(self)
        StoredMatrix.__init__(self, matrix)
        if gain is not None:
            self.gain = AdapterConstant(gain)

    @classmethod
    def alike(cls, parts: Sequence["ServedUpdate"]) -> Sequence["ServedUpdate"]:
        """Give all updates factors of the columns, 1 for those without, if any of them has such factors."""
        if any(hasattr(part, "gain") for part in parts):
            for part in parts:
                if not hasattr(part, "gain"):
                    part.gain = AdapterConstant(jnp.ones(part.shape[1], jnp.float32))
        return parts

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        moved = self.stored().apply(x).astype(jnp.float32)
        return _gained(self.gain[...], y, y.astype(jnp.float32) + moved) if hasattr(self, "gain") else moved


def _gained(gain: Float[Array, "out"], y: Float[Array, "*batch out"], moved: Array) -> Float[Array, "*batch out"]:
    """Return what must be added to y to get `gain * moved`, in float32."""
    gain = jnp.expand_dims(gain, tuple(range(y.ndim - 1)))
    return gain * moved.astype(jnp.float32) - y.astype(jnp.float32)


def _norms(kernel: Float[Array, "in out"]) -> Float[Array, "out"]:
    """Return the Euclidean norm of every column of the kernel. Each column belongs to one output feature."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=0))


def _nearest_like(matrix: StructuredMatrix, dense: Float[Array, "in out"]) -> StructuredMatrix:
    """Return the matrix nearest to `dense` that has the same family, sizes and blocks as `matrix`.

    For a product, or for a sum whose terms overlap, a search finds an approximately nearest matrix.
    """
    if isinstance(matrix, Sum):
        terms: list[StructuredMatrix] = []
        for term in matrix.terms:
            terms.append(_nearest_like(term, dense - sum(found.to_dense() for found in terms)))
        blocks = all(isinstance(term, Placed) for term in terms)  # Blocks of one kernel do not overlap.
        return Sum(tuple(terms)) if blocks else refine(Sum(tuple(terms)), dense)
    if isinstance(matrix, Product):
        return refine(matrix, dense)
    if isinstance(matrix, Placed):
        (row, column), (rows, columns) = matrix.offset, matrix.matrix.shape
        block = dense[row : row + rows, column : column + columns]
        return Placed(_nearest_like(matrix.matrix, block), matrix.shape, matrix.offset)
    if not isinstance(matrix, Family):
        raise UserError(f"no nearest matrix can be computed for a {type(matrix).__name__}")
    return matrix.nearest(dense, **matrix.options())
