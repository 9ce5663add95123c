"""Kernels that qwix has quantised, and products that it must leave as they are.

`qwix.quantize_model` replaces kernels by integers with scales, and replaces functions such as `jax.lax.dot_general`
while the model is called. The product with the kernel stays its business. What adapters add is computed without it, in
floating point, so that an adapter learns the same as over the dequantised kernel.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError


def is_quantised(kernel: Any) -> bool:
    """Return whether a kernel, the attribute of a module or the value with which it multiplies, is quantised."""
    qwix = sys.modules.get("qwix")  # Without it, nothing is quantised. It is never imported here.
    return qwix is not None and isinstance(getattr(kernel, "array", None), qwix.QArray)


def kernel_value(kernel: Any) -> Float[Array, "..."]:
    """Return the array of a kernel, which is dequantised if qwix quantised it.

    For an abstract kernel, the result is a `jax.ShapeDtypeStruct`.
    """
    if not is_quantised(kernel):
        return kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel
    stored = jax.tree.map(_value, kernel.array, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    dequantise = sys.modules["qwix"].dequantize
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(stored)):
        return jax.eval_shape(dequantise, stored)
    with own_products():
        return dequantise(stored)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def dequantise(module: nnx.Module) -> None:
    """Replace the quantised kernels in a module, in place, by floating-point parameters."""
    for _, child in nnx.iter_modules(module):
        for name, value in list(vars(child).items()):
            if is_quantised(value):
                setattr(child, name, nnx.Param(kernel_value(value)))


def _manager() -> Any:
    """Return the object with which qwix replaces functions, or `None` if it is not imported.

    qwix has no public name for it.
    """
    interception = sys.modules.get("qwix._src.interception")
    return interception and interception.interception_manager


def own_products_only(module: nnx.Module) -> bool:
    """Return whether what adapters add must be computed apart, because qwix replaces functions in this call.

    Raises:
        UserError: If `qwix.quantize_model` quantises the adapted model in this call.
    """
    manager = _manager()
    if manager is None:
        return False
    disabled = manager.disable_interception()
    manager.enable_interception(disabled)
    if disabled and vars(module).get("disable_quant_stats_update"):
        raise UserError("the model has an adapter and cannot be quantised: call qwix.quantize_model first, then adapt")
    return bool(disabled)


@contextlib.contextmanager
def own_products() -> Iterator[None]:
    """Compute products within the `with` block as they are written, without the functions of qwix."""
    manager = _manager()
    disabled = manager.disable_interception() if manager else []
    try:
        yield
    finally:
        if manager:
            manager.enable_interception(disabled)
