"""Kernels of classes of other libraries, by the name of the class. The libraries are not imported."""

from typing import Any

from surm_jax.errors import UserError
from surm_jax.peft.kernels.base import KNOWN
from surm_jax.peft.kernels.parameter import CallKind

_TUNIX = ("gemma", "gemma3", "llama3", "qwen2", "qwen3")


def _of_tunix(module: Any) -> str:
    return module.einsum_str


def _of_maxtext(module: Any) -> str:
    rows, columns = len(module.in_features_shape), len(module.out_features_shape)
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    if sorted(axis) != list(range(-rows, 0)) or module.quant is not None:
        raise UserError("it contracts other axes than the last ones, or is quantised: name its parameter `kernel`")
    i, o = "abcd"[:rows], "wxyz"[:columns]
    return f"...{i},{i}{o}->...{o}"


KNOWN.update({f"tunix.models.{name}.model.Einsum": CallKind("w", _of_tunix) for name in _TUNIX})
KNOWN["bonsai.models.llada.modeling.ShardedLinear"] = CallKind("kernel", "...i,io->...o")
KNOWN["maxtext.layers.linears.DenseGeneral"] = CallKind("kernel", _of_maxtext)
