"""A structured matrix as a module: its arrays are variables under the names that the matrix gives them."""

from collections.abc import Collection

from flax import nnx

from surm_jax.peft.parts.variables import AdapterConstant, AdapterParam
from surm_jax.structured import StructuredMatrix


class StoredMatrix(nnx.Module):
    """Holds a structured matrix.

    Args:
        matrix: of shape (in_features, out_features).
        frozen: names of arrays that are not trained; of arrays of a composite, such as `terms_0_down`, their last part.
    """

    def __init__(self, matrix: StructuredMatrix, frozen: Collection[str] = ()) -> None:
        self.frozen = tuple(frozen)
        self._keep(matrix)

    def _keep(self, matrix: StructuredMatrix) -> None:
        arrays = matrix.arrays()
        self.names = tuple(arrays)
        # The matrix with nothing in it: its family and its static sizes.
        self.empty = nnx.static(matrix.with_arrays(**dict.fromkeys(arrays)))
        for name, array in arrays.items():
            kind = AdapterConstant if name.rpartition("_")[2] in self.frozen else AdapterParam
            setattr(self, name, kind(array))

    def stored(self) -> StructuredMatrix:
        """Returns the matrix as it is now."""
        return self.empty.with_arrays(**{name: getattr(self, name).get_value() for name in self.names})

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's (in_features, out_features)."""
        return self.stored().shape

    def fuse(self) -> None:
        """Keeps the matrix in its smallest form from now on, in place: for deployment."""
        fused = self.stored().compact()
        for name in self.names:
            delattr(self, name)
        self._keep(fused)
