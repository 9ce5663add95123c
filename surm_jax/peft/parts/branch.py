"""The adapter-style branch: a module computes `y + act(y M) + b` where it computed y."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.peft.methods.base import ACTIVATIONS, Bottleneck
from surm_jax.peft.parts.context import drop
from surm_jax.peft.parts.stored import StoredMatrix
from surm_jax.peft.parts.variables import AdapterParam, AdapterScale
from surm_jax.structured import StructuredMatrix


class Branch(nnx.Module):
    """The branch of one module by one adapter.

    Parameter paths: `down/<arrays>`, and `down_bias`, `up/<arrays>` where there is a waist; `bias`.

    Args:
        method: with its settings.
        matrices: M, or D and U.
    """

    def __init__(self, method: Bottleneck, matrices: tuple[StructuredMatrix, ...]) -> None:
        first, *rest = matrices
        self.activation, self.dropout, self.alpha = method.activation, method.dropout, method.alpha
        self.scale = AdapterScale(jnp.ones((), jnp.float32))
        self.down = StoredMatrix(first)
        if rest:
            self.up = StoredMatrix(rest[0])
        if method.bias:
            if rest:
                self.down_bias = AdapterParam(jnp.zeros((first.shape[1],), jnp.float32))
            self.bias = AdapterParam(jnp.zeros((matrices[-1].shape[1],), jnp.float32))

    def fuse(self) -> None:
        """Keeps every matrix in its smallest form from now on, in place: for deployment."""
        for part in self._matrices().values():
            part.fuse()

    def tensors(self) -> dict[str, nnx.Variable]:
        """Returns the variables that are saved, by name."""
        found = {name: getattr(self, name) for name in ("down_bias", "bias") if hasattr(self, name)}
        for prefix, part in self._matrices().items():
            found |= {f"{prefix}/{name}": getattr(part, name) for name in part.names}
        return found

    def matrices(self) -> tuple[StructuredMatrix, ...]:
        """Returns M, or D and U, as they are now."""
        return tuple(part.stored() for part in self._matrices().values())

    def _matrices(self) -> dict[str, StoredMatrix]:
        return {name: getattr(self, name) for name in ("down", "up") if hasattr(self, name)}

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Returns what is added to x, in the dtype of x, to which every product is rounded."""
        hidden = _plus(self.down.stored().apply(drop(x, self.dropout)), getattr(self, "down_bias", None))
        hidden = ACTIVATIONS[self.activation](hidden)
        if hasattr(self, "up"):
            hidden = self.up.stored().apply(hidden)
        hidden = _plus(hidden, getattr(self, "bias", None))
        return hidden * (self.alpha * self.scale[...]).astype(hidden.dtype)


def _plus(x: Array, bias: AdapterParam | None) -> Array:
    if bias is None:
        return x
    return x + jnp.expand_dims(bias[...], tuple(range(x.ndim - 1))).astype(x.dtype)


class Branched(nnx.Module):
    """What a module with branches gains: branches by the name of their adapter. See `surm_jax.peft.parts.attach`."""

    branch: nnx.Dict[Branch]

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The module's output, and what all branches make of that same output."""
        y = super().__call__(*args, **kwargs)
        return sum((branch(y) for branch in self.branch.values()), start=y)
