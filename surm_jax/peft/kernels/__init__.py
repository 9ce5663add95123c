"""What modules multiply by: one file for each kind of kernel. Importing this package registers all of them."""

from surm_jax.peft.kernels import conv, einsum, embed, linear, parameter
from surm_jax.peft.kernels.base import KINDS, AdaptedLayer, Kernel, Kind, check_product, check_slots, kernel_of, kind_of

__all__ = [
    "KINDS",
    "AdaptedLayer",
    "Kernel",
    "Kind",
    "check_product",
    "check_slots",
    "conv",
    "einsum",
    "embed",
    "kernel_of",
    "kind_of",
    "linear",
    "parameter",
]
