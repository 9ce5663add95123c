"""How many features the outputs of a module have, and in how many layers it is stacked."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft.kernels.base import Kernel, kernel_of, kind_of
from surm_jax.peft.kernels.quantised import dequantise
from surm_jax.peft.parts.base import original_class


def module_stack(module: nnx.Module, path: str) -> tuple[int, ...]:
    """Return the sizes of the axes by which a module is a stack of layers, such as one made by `nnx.vmap`.

    The kernels among the module's attributes show these axes. A module without kernels is no stack.

    Raises:
        UserError: If the kernels are stacked in different ways.
    """
    stacks = {kernel.stack for kernel in _kernels(module, path)}
    if len(stacks) > 1:
        raise UserError(f"its layers are stacked in different ways, {sorted(stacks)}: target one of them instead")
    return stacks.pop() if stacks else ()


def output_width(module: nnx.Module, path: str) -> int:
    """Return the number of output features of a module.

    If the module has no kernel, it is called with abstract inputs (`jax.eval_shape`). The number of input features is
    not known, so those of every kernel among the module's attributes are tried. All calls without an error must give
    the same output width.

    Raises:
        UserError: If no call gives an output width, or if two calls give different ones. For a module with a kernel, if
            its output does not have exactly one feature axis.
    """
    kind = kind_of(module)
    if kind is not None:
        kernel_of(module, path)
        shape = kind.widths(module)
        if not shape:
            raise UserError("its output does not end with a feature axis, which a branch needs")
        if len(shape) > 1:
            raise UserError(f"its output has several feature axes {shape}, but a branch needs exactly one")
        return shape[0]
    widths = {kernel.layout.matrix[0] for kernel in _kernels(module, path)}
    depth = len(module_stack(module, path))
    found = {answer for width in widths if (answer := _answer(module, width, depth)) is not None}
    if len(found) != 1:
        raise UserError(
            f"the width of its output cannot be found from the layers of a {type(module).__name__}:"
            " target the layer that computes the output instead"
        )
    return found.pop()


def _kernels(module: Any, path: str) -> list[Kernel]:
    modules = [module] if kind_of(module) else vars(module).values()
    return [kernel_of(child, path) for child in modules if isinstance(child, nnx.Module) and kind_of(child)]


def _answer(module: nnx.Module, width: int, depth: int) -> int | None:
    """Call a module with inputs of `width` features, and return its output width, or `None` if it raises an error.

    If the module is a stack of layers, `depth` is the number of its stack axes, and one layer is called.
    """
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[depth:], leaf.dtype), state)
    # The `__call__` of an adapted module takes `*args` and does not show its parameters.
    call = original_class(module).__call__
    parameters = list(inspect.signature(call).parameters.values())[2:]
    others = [None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for shape in ((1, 1, width), (1, width)):
        try:
            with jax.numpy_dtype_promotion("standard"):
                output = jax.eval_shape(
                    lambda state, x: _floating(nnx.merge(graphdef, state))(x, *others),
                    state,
                    jax.ShapeDtypeStruct(shape, jnp.float32),
                )
                return output.shape[-1]
        except Exception:  # A user's module may raise anything for an input of the wrong shape.
            continue
    return None


def _floating(module: Any) -> Any:
    dequantise(module)
    return module
