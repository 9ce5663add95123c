"""Linear layers as matrices: which layers can be adapted, and how their inputs and outputs become vectors.

The kernel of `nnx.Linear` has the shape (in, out). The kernel of `nnx.LinearGeneral`, which Flax's attention uses, may
have more axes, such as (width, heads, head_dim). This package then reshapes it to a matrix, (width, heads * head_dim).
"""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.parts.base import OUTPUT, SLOTS, is_adapted, original_class


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A linear layer seen as a matrix of shape (in_features, out_features) that multiplies vectors.

    Attributes:
        in_shape: The sizes of the input axes that the layer contracts. In a vector, these axes are flattened in
            row-major order.
        out_shape: The sizes of the axes that follow the batch axes in the output. In a vector, they are flattened in
            row-major order.
        axes: The indices of the input axes that the layer contracts. Their order has no meaning, as in
            `nnx.LinearGeneral`: the entries of `in_shape` belong to the axes in ascending order.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (in_features, out_features)."""
        return math.prod(self.in_shape), math.prod(self.out_shape)

    def vectors(self, x: Float[Array, "..."]) -> Float[Array, "... in"]:
        """Return the layer's input with the contracted axes flattened into one last axis of length in_features."""
        last = tuple(range(-len(self.axes), 0))
        x = jnp.moveaxis(x, sorted(axis % x.ndim for axis in self.axes), last)
        return x.reshape(*x.shape[: x.ndim - len(last)], self.shape[0])

    def outputs(self, y: Float[Array, "... out"]) -> Float[Array, "..."]:
        """Return y with its last axis, of length out_features, reshaped to the feature axes of the layer's output."""
        return y.reshape(*y.shape[:-1], *self.out_shape)


def is_linear(module: nnx.Module) -> bool:
    """Return whether `module` is an instance of `nnx.Linear` or `nnx.LinearGeneral`, or of a subclass of them."""
    return isinstance(module, nnx.Linear | nnx.LinearGeneral)


def check_call(module: nnx.Module, path: str, slot: str) -> None:
    """Check that a part in a given slot can add its term to the output of a module.

    A kernel part takes effect in the `__call__` of `nnx.Linear` or `nnx.LinearGeneral`. A subclass whose own `__call__`
    reads `self.kernel` would ignore the part. An output part works with any `__call__`.

    Args:
        module: The module that a rule matched.
        path: The path of the module, for messages.
        slot: The slot of the part, one of `SLOTS`.

    Raises:
        UserError: If the module has an attribute of its own with the name of a slot. For a kernel part, also if the
            `__call__` of a subclass does not use `super()`, if a subclass defines `dot_general`, or if the kernel is
            not one matrix (`matrix_view`).
    """
    for name in SLOTS:
        if hasattr(module, name) and not (is_adapted(module) and isinstance(getattr(module, name), nnx.Dict)):
            raise UserError(
                f"{path} cannot be adapted: it has an attribute `{name}` of its own, where parts of adapters go"
            )
    if slot == OUTPUT:
        return
    for cls in original_class(module).__mro__:
        if cls in (nnx.Linear, nnx.LinearGeneral):
            break
        if "dot_general" in vars(cls) or "dot_general_cls" in vars(cls):
            raise UserError(
                f"{path} cannot be adapted: {cls.__name__} defines its own dot_general, where the update is added"
            )
        call = vars(cls).get("__call__")
        if call is not None and "super" not in inspect.unwrap(call).__code__.co_names:
            raise UserError(
                f"{path} cannot be adapted: {cls.__name__}.__call__ does not call super().__call__,"
                " where the update is added"
            )
    matrix_view(module, path)


def output_width(module: nnx.Module, path: str) -> int:
    """Return the number of output features of a module.

    For a linear layer, the number follows from the shape of its kernel. Any other module is called with abstract inputs
    (`jax.eval_shape`). The number of input features is not known, so the in_features of every linear layer among the
    module's attributes are tried. The calls that raise no error must all give the same output width. The names and the
    order of the linear layers have no influence, because copying a module sorts its attributes.

    Raises:
        UserError: If no call gives an output width, or if two calls give different ones. For a linear layer, if its
            output has several feature axes, or if its kernel is not one matrix (`matrix_view`).
    """
    if is_linear(module):
        shape = matrix_view(module, path).out_shape
        if len(shape) > 1:
            raise UserError(f"its output has several feature axes {shape}, but a branch needs exactly one")
        return shape[0]
    layers: list[Any] = [child for child in vars(module).values() if isinstance(child, nnx.Module) and is_linear(child)]
    widths = {math.prod(f) if isinstance(f := layer.in_features, tuple) else f for layer in layers}
    found = {answer for width in widths if (answer := _answer(module, width)) is not None}
    if len(found) != 1:
        raise UserError(
            f"the width of its output cannot be found from the linear layers of a {type(module).__name__}:"
            " target the layer that computes the output instead"
        )
    return found.pop()


def _answer(module: nnx.Module, width: int) -> int | None:
    """Return the output width of a module for inputs of `width` features, or `None` if the module rejects them."""
    graphdef, state = nnx.split(module)
    # The `__call__` of an adapted module takes `*args` and does not show its parameters.
    call = original_class(module).__call__
    parameters = list(inspect.signature(call).parameters.values())[2:]
    others = [None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for shape in ((1, 1, width), (1, width)):
        try:
            with jax.numpy_dtype_promotion("standard"):
                output = jax.eval_shape(
                    lambda state, x: nnx.merge(graphdef, state)(x, *others),
                    state,
                    jax.ShapeDtypeStruct(shape, jnp.float32),
                )
                return output.shape[-1]
        except Exception:  # A user's module may raise anything for an input of the wrong shape.
            continue
    return None


def matrix_view(module: Any, path: str) -> MatrixView:
    """Return the view of a linear layer as one matrix.

    Args:
        module: An `nnx.Linear` or `nnx.LinearGeneral`.
        path: The path of the layer in the model, for messages.

    Raises:
        UserError: If the kernel has batch axes or is a stack of several layers, so that it is not one matrix.
    """
    if isinstance(module, nnx.LinearGeneral):
        if module.batch_axis:
            raise UserError(
                f"{path} cannot be adapted: its kernel has batch axes {dict(module.batch_axis)}, so it is many matrices"
            )
        view = MatrixView(tuple(module.in_features), tuple(module.out_features), tuple(module.axis))
    else:
        view = MatrixView((module.in_features,), (module.out_features,), (-1,))
    expected = (*view.in_shape, *view.out_shape)
    if module.kernel.shape != expected:
        raise UserError(
            f"{path} cannot be adapted: its kernel has the shape {module.kernel.shape},"
            f" one matrix would have {expected} (a stack of layers is not supported)"
        )
    return view


def kernel_matrix(module: Any, path: str) -> Float[Array, "in out"]:
    """Return the kernel of a linear layer as a matrix of shape (in_features, out_features).

    If the layer is abstract (`nnx.eval_shape`), the result is a `jax.ShapeDtypeStruct`.

    Raises:
        UserError: If the kernel is not one matrix (`matrix_view`).
    """
    shape, kernel = matrix_view(module, path).shape, module.kernel.get_value()
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, kernel.dtype)  # type: ignore[return-value]  # as in `nnx.eval_shape`
    return kernel.reshape(shape)
