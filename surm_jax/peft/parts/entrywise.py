"""Updates that are computed entry by entry from the dense form of a matrix, and perhaps from the kernel.

Such an update has no fast product. Its dense form is computed in each product, and computed again in the backward
pass, so that nothing of the size of the kernel is kept between the two.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.parts.base import AdapterConstant
from surm_jax.peft.parts.dropout import drop
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import Dot, StructuredMatrix


class EntrywisePart(UpdatePart):
    """An update `factor * alpha * D`. D is a function of a matrix M and perhaps the kernel, entry by entry.

    Attributes:
        formula: The function in short, with `{}` for M, for tables and messages.
    """

    formula: ClassVar[str]

    def entries(self, matrix: Float[Array, "in out"], kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return the update D, given the dense form of M and the kernel. All are in float32."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """The formula of the update as text, with the family of M in it, for tables."""
        return self.formula.format(super().kind)

    def form(self) -> str:
        """Return a description of the update, with the shapes of the arrays of M."""
        return self.formula.format(super().form())

    def plain_matrix(self) -> StructuredMatrix | None:
        """Return `None`, because the update is not a structured matrix."""
        return None

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Raise an error, because the update is not a multiple of one structured matrix.

        Raises:
            UserError: Always.
        """
        raise UserError(f"is {self.kind}, not a multiple of one matrix")

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Raise an error, because no method to find the nearest part is implemented.

        Raises:
            UserError: Always.
        """
        raise UserError(f"its update {self.kind} is computed entry by entry, and cannot be fitted to a given change")

    def for_bank(self, kernel: Float[Array, "in out"] | None) -> Any:
        """Return a copy that holds all factors in one array, so that the factors of adapters in a bank may differ."""
        served: Any = nnx.clone(self)
        served.alpha = AdapterConstant(jnp.asarray(self._multiplier(), jnp.float32))
        served.factor, served.dropout = 1.0, 0.0
        return served

    def _multiplier(self) -> float | Array:
        return self.factor * self.alpha[...] if hasattr(self, "alpha") else self.factor

    def _change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        # Files store the smallest form of M, so that a loaded update computes the same bits as the saved one.
        dense = self.stored().compact().to_dense().astype(jnp.float32)
        return self._multiplier() * self.entries(dense, kernel.astype(jnp.float32))

    def _added(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        graphdef, state = nnx.split(self)

        @jax.checkpoint
        def product(x: Array, state: Any, kernel: Array) -> Array:
            return dot(x, nnx.merge(graphdef, state)._change(kernel).astype(kernel.dtype))

        return product(drop(x, self.dropout), state, kernel)

    def _rows(self, ids: Array, y: Array, kernel: Array) -> Array:
        return drop(jnp.ones((*ids.shape, 1), jnp.float32), self.dropout) * self._change(kernel)[ids]


class ModulatedPart(EntrywisePart):
    """An update of the kernel W by the entrywise product `W * M`."""

    reads_kernel = True
    formula = "W * {}"

    def entries(self, matrix: Float[Array, "in out"], kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return the entrywise product of the kernel and M."""
        return kernel * matrix
