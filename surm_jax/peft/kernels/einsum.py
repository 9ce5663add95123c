"""The kernels of `nnx.Einsum`, from which the attention of many decoders is made.

The equation says which axes of the kernel are the rows and the columns of a matrix
(`surm_jax.peft.kernels.contraction`). A kernel for query, key and value together, as in "btd,sdnh->sbtnh" with s = 3,
is one matrix of shape (d, s * n * h). A rule with `parts=3` gives each of the three its own matrix.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from surm_jax.errors import UserError
from surm_jax.peft.kernels.base import KINDS, Hooked, Kind, Product
from surm_jax.peft.kernels.contraction import Contraction, Layout


class AdaptedEinsum(Hooked):
    """An `nnx.Einsum` whose product includes what adapters add."""

    hook = "einsum_op"

    def product(self, base: Callable[..., Array] | None, *args: Any, **options: Any) -> Array:
        """Return the product of the module's inputs and kernel, plus what adapters add."""
        equation, inputs, kernel = args
        multiply = base or jnp.einsum
        plain = {name: value for name, value in options.items() if name != "out_sharding"}
        contraction = Contraction.parse(equation)
        product = Product(
            contraction,
            contraction.layout(kernel.shape),
            lambda x, kernel: multiply(equation, x, kernel, **options),
            lambda x, kernel: multiply("...i,io->...o", x, kernel, **plain),
        )
        return product.adapted(self, inputs, kernel)


class EinsumKind(Kind):
    """How `nnx.Einsum` multiplies by its kernel."""

    mixin = AdaptedEinsum
    hooks = ("einsum_op",)

    def layout(self, module: Any) -> Layout:
        """Return how the kernel holds matrices, according to the module's equation."""
        return _contraction(module).layout(tuple(module.kernel_shape))

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the sizes of the output's last axes, those that come from the kernel. The result may be empty."""
        contraction = _contraction(module)
        sizes = dict(zip(contraction.kernel, module.kernel_shape, strict=True))
        last = contraction.output[len(contraction.output.rstrip(contraction.columns)) :]
        return tuple(sizes[c] for c in last)


def _contraction(module: Any) -> Contraction:
    if module.einsum_str is None:
        raise UserError("it is called with another equation each time, so that its kernel is no single matrix")
    return Contraction.parse(module.einsum_str)


KINDS[nnx.Einsum] = EinsumKind()
