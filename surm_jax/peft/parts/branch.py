"""Branches, which add a small non-linear term to the output y of a module: `y + act(y M) + b`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.peft.parts.base import AdapterParam, OutputPart
from surm_jax.peft.parts.dropout import drop
from surm_jax.peft.parts.update import StoredMatrix
from surm_jax.structured import StructuredMatrix

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
"""The non-linearities of branches. All of them map 0 to 0."""


class BranchPart(OutputPart):
    """A branch at the output y of one module, which adds `alpha * (act(y M) + b)` or `alpha * (act(y D + d) U + b)`.

    In the part, the arrays of M or D have the paths `down/<array>`, and those of U `up/<array>`. The path of b is
    `bias`, and that of d is `down_bias`.

    Args:
        matrices: The matrix M, or the matrices D and U.
        activation: The name of the non-linearity `act`, one of `ACTIVATIONS`.
        bias: Whether the branch has the bias b and, with two matrices, d. They start at 0.
        alpha: The fixed factor of the branch.
        dropout: The probability of zeroing an entry of the branch's input during training.
    """

    def __init__(
        self,
        matrices: tuple[StructuredMatrix, ...],
        *,
        activation: str = "gelu",
        bias: bool = True,
        alpha: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        first, *rest = matrices
        self.activation, self.dropout, self.alpha = activation, dropout, alpha
        self.down = StoredMatrix(first)
        if rest:
            self.up = StoredMatrix(rest[0])
        if bias:
            if rest:
                self.down_bias = AdapterParam(jnp.zeros((first.shape[1],), jnp.float32))
            self.bias = AdapterParam(jnp.zeros((matrices[-1].shape[1],), jnp.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """The (in_features, out_features) of the branch, which are both the width of the module's output."""
        matrices = self.matrices()
        return matrices[0].shape[0], matrices[-1].shape[1]

    @property
    def kind(self) -> str:
        """The name of the family of the first matrix, such as "Circulant", for tables."""
        return type(self.matrices()[0]).__name__

    def form(self) -> str:
        """Return a description of the matrices, with the shapes of their arrays, and of the settings."""
        matrices = " and ".join(map(repr, self.matrices()))
        return f"a branch of {matrices}, activation={self.activation}, alpha={self.alpha}"

    def compact(self) -> None:
        """Replace every matrix, in place, by its smallest form."""
        for stored in self._stored():
            stored.compact()

    def matrices(self) -> tuple[StructuredMatrix, ...]:
        """Return M, or D and U, with the current values of their arrays."""
        return tuple(stored.stored() for stored in self._stored())

    def for_bank(self, kernel: Array | None) -> "BranchPart":
        """Return the branch without dropout, so that branches with different dropout rates can be stacked."""
        part = nnx.clone(self)
        part.dropout = 0.0
        return part

    def _stored(self) -> list[StoredMatrix]:
        return [getattr(self, name) for name in ("down", "up") if hasattr(self, name)]

    def _added(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Compute what the branch adds, without the scale. Every product is rounded to the dtype of y."""
        hidden = _plus(self.down.stored().apply(drop(y, self.dropout)), getattr(self, "down_bias", None))
        hidden = ACTIVATIONS[self.activation](hidden)
        if hasattr(self, "up"):
            hidden = self.up.stored().apply(hidden)
        return _plus(hidden, getattr(self, "bias", None)) * jnp.asarray(self.alpha, hidden.dtype)


def _plus(x: Array, bias: AdapterParam | None) -> Array:
    if bias is None:
        return x
    return x + jnp.expand_dims(bias[...], tuple(range(x.ndim - 1))).astype(x.dtype)
