"""The kernels of `nnx.Linear` and `nnx.LinearGeneral`, and of their subclasses.

The kernel of `nnx.Linear` has the shape (in, out). The kernel of `nnx.LinearGeneral`, which Flax's attention uses, may
have more axes, such as (width, heads, head_dim). It is then the matrix (width, heads * head_dim). If it has batch axes,
it holds one matrix for each of their entries.
"""

import string
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from surm_jax.peft.kernels.base import KINDS, Hooked, Kind, Product
from surm_jax.peft.kernels.contraction import Contraction, Layout


class AdaptedLinear(Hooked):
    """A linear layer whose product includes what adapters add."""

    hook = "dot_general"

    @property
    def dot_general_cls(self) -> None:
        """Always `None`. This hides the layer's own attribute, which Flax would use instead of `dot_general`."""

    @dot_general_cls.setter
    def dot_general_cls(self, base: Callable[[], Callable[..., Array]] | None) -> None:
        vars(self)["dot_general_cls"] = base

    def product(self, base: Callable[..., Array] | None, *args: Any, **options: Any) -> Array:
        """Return the product of the layer's inputs and kernel, plus what adapters add."""
        inputs, kernel, dimensions = args
        own = vars(self).get("dot_general_cls")
        multiply = own() if own else base or jax.lax.dot_general
        contraction = _contraction(inputs.ndim, kernel.ndim, dimensions)
        product = Product(
            contraction,
            contraction.layout(kernel.shape),
            lambda x, kernel: multiply(x, kernel, dimensions, **options),
            lambda x, kernel: multiply(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **_unsharded(options)),
        )
        return product.adapted(self, inputs, kernel)


def _unsharded(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "out_sharding"}


def _contraction(inputs: int, kernel: int, dimensions: Any) -> Contraction:
    """Return the contraction that `jax.lax.dot_general` computes for these axes of the inputs and the kernel."""
    (contracted, _), (batch, _) = dimensions
    letters = string.ascii_letters[:inputs]
    shared = "".join(letters[axis] for axis in (*batch, *contracted))
    new = string.ascii_letters[inputs : inputs + kernel - len(shared)]
    kept = "".join(c for c in letters if c not in shared)
    return Contraction(letters, shared + new, shared[: len(batch)] + kept + new)


class LinearKind(Kind):
    """How `nnx.Linear` multiplies by its kernel."""

    mixin = AdaptedLinear
    hooks = ("dot_general", "dot_general_cls")

    def layout(self, module: Any) -> Layout:
        """Return the layout of a matrix of shape (in_features, out_features)."""
        return Layout((module.in_features, module.out_features), (0,), (1,))

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the number of output features."""
        return (module.out_features,)


class LinearGeneralKind(LinearKind):
    """How `nnx.LinearGeneral` multiplies by its kernel."""

    def layout(self, module: Any) -> Layout:
        """Return the layout of a kernel with the axes (*batch, *in_features, *out_features)."""
        batch, rows = len(module.batch_axis), len(module.in_features)
        shape = (*module.batch_axis.values(), *module.in_features, *module.out_features)
        axes = range(len(shape))
        return Layout(shape, tuple(axes[batch : batch + rows]), tuple(axes[batch + rows :]), tuple(axes[:batch]))

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the sizes of the feature axes of the output."""
        return tuple(module.out_features)


KINDS[nnx.Linear] = LinearKind()
KINDS[nnx.LinearGeneral] = LinearGeneralKind()
