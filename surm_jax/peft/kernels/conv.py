"""The kernels of `nnx.Conv`: a convolution multiplies every patch of its input by one matrix.

The kernel has the shape (k, ..., in, out), and the matrix the shape (k * ... * in, out), as in Hugging Face's peft and
in LyCORIS. A convolution with groups has one matrix for each of them. Strides, dilation and padding change which
patches there are.

With `execution="auto"`, one convolution with the sum of the kernel and its updates is computed, and no patches are
formed. Updates with dropout or with learned lengths (DoRA), and `execution="fft"`, do form them. They take k * k times
the memory of the input.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.kernels.base import KINDS, Hooked, Kind, Product
from surm_jax.peft.kernels.contraction import Contraction, Layout


class AdaptedConv(Hooked):
    """An `nnx.Conv` whose product includes what adapters add."""

    hook = "conv_general_dilated"

    def product(self, base: Callable[..., Array] | None, *args: Any, **options: Any) -> Array:
        """Return the convolution of the module's inputs and kernel, plus what adapters add."""
        inputs, kernel, strides, padding = args
        groups = options["feature_group_count"]
        convolve = base or jax.lax.conv_general_dilated
        width = kernel.shape[-1]
        window = {name: options[name] for name in ("lhs_dilation", "rhs_dilation", "dimension_numbers")}
        dtype = options.get("preferred_element_type")
        product = Product(
            Contraction.parse("...i,io->...o" if groups == 1 else "...gi,igo->...go"),
            _layout(kernel.shape, groups),
            lambda x, kernel: convolve(x, kernel, strides, padding, **options),
            lambda x, kernel: jnp.matmul(x, kernel, precision=options["precision"], preferred_element_type=dtype),
            unfold=functools.partial(_patches, kernel.shape[:-2], groups, strides, padding, window),
            divide=lambda y: y if groups == 1 else y.reshape(*y.shape[:-1], groups, width // groups),
            join=lambda y: y if groups == 1 else y.reshape(*y.shape[:-2], width),
            execution="auto" if math.prod(kernel.shape[:-2]) == 1 else "dense",
        )
        return product.adapted(self, inputs, kernel)


def _patches(
    size: tuple[int, ...],
    groups: int,
    strides: Any,
    padding: Any,
    window: dict[str, Any],
    x: Float[Array, "n *space c"],
) -> Float[Array, "..."]:
    """Cut images into the patches that a convolution multiplies by its kernel.

    Returns:
        The flattened patches, (n, *space, k * ... * c), or (n, *space, groups, k * ... * c / groups).
    """
    channels = x.shape[-1]
    found = jax.lax.conv_general_dilated_patches(
        x, size, strides, padding, precision=jax.lax.Precision.HIGHEST, **window
    )
    # JAX puts the channels before the positions in the patch.
    found = found.reshape(*found.shape[:-1], groups, channels // groups, math.prod(size)).swapaxes(-1, -2)
    return found.reshape(*found.shape[: x.ndim - 1], *([groups] if groups > 1 else []), -1)


def _layout(shape: tuple[int, ...], groups: int) -> Layout:
    rows, width = math.prod(shape[:-1]), shape[-1]
    if groups == 1:
        return Layout(shape, (0,), (1,), divided=(rows, width))
    return Layout(shape, (0,), (2,), (1,), divided=(rows, groups, width // groups))


class ConvKind(Kind):
    """How `nnx.Conv` multiplies by its kernel."""

    mixin = AdaptedConv
    hooks = ("conv_general_dilated",)

    def layout(self, module: Any) -> Layout:
        """Return the layout of a kernel of shape (k, ..., in_features / groups, out_features)."""
        if module.mask is not None:
            raise UserError("its kernel is multiplied by a mask: name the parameter `kernel` instead, with `axes`")
        return _layout(tuple(module.kernel_shape), module.feature_group_count)

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the number of output features."""
        return (module.out_features,)


KINDS[nnx.Conv] = ConvKind()
