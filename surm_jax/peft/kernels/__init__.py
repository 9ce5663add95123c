"""The kernels that adapters can change, one file for each kind. Importing this package registers all kinds."""

from surm_jax.peft.kernels import conv, einsum, embed, known, linear, parameter
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
    "known",
    "linear",
    "parameter",
]
