"""Add updates to a parameter itself, for modules that multiply inside their own methods, and register their classes.

Whoever reads the adapted parameter gets `W + M`: the module's own methods, or a parent that reads the attribute. So any
use of the parameter is allowed. Every call forms M and `W + M`, and the backward pass forms the gradient of the whole
kernel. `describe` marks such updates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from surm_jax.errors import UserError
from surm_jax.peft.kernels.base import (
    KINDS,
    AdaptedLayer,
    Kernel,
    Kind,
    Product,
    constant_kernel,
    kernel_of,
    kernel_parts,
    kind_of,
    probed,
)
from surm_jax.peft.kernels.contraction import Contraction, Layout
from surm_jax.peft.kernels.quantised import kernel_value, own_products, own_products_only
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.parts.base import KERNEL, KernelPart
from surm_jax.peft.parts.stacks import one_of


class AdaptedParameters(AdaptedLayer):
    """A module with updates of its parameters. Reading such a parameter gives its sum with the updates."""

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute. For an adapted parameter it is a new variable with the sum."""
        value = super().__getattribute__(name)
        if not isinstance(value, nnx.Variable) or isinstance(value.get_value(), jax.ShapeDtypeStruct):
            return value
        parts = _parts_at(self, name)
        if not parts:
            return value
        frozen = probed(value[...])
        kind = kind_of(self)
        own = kind.axes(self) if isinstance(kind, ParameterKind) and kind.parameter == name else ""
        return value.copy(sum((added_at(part, frozen, part.axes or own) for part in parts), start=frozen))


def added_at(part: KernelPart, array: Array, axes: str) -> Array:
    """Return what a part adds to a parameter, in the form and dtype of the parameter.

    The backward pass computes the update again, so that nothing of the size of the parameter is kept for it.

    Args:
        part: The part.
        array: The parameter.
        axes: A letter for each of its axes in one layer. Without it, the parameter is a matrix.

    Raises:
        UserError: If the part is for matrices of another shape. The message is the end of a sentence.
    """
    layout = _layout(axes or "io", array.shape)
    if layout.matrix != (shape := one_of(part).shape):
        raise UserError(f"has the shape {array.shape}, but the update was made for matrices of shape {shape}")
    graphdef, state = nnx.split(part)

    @jax.checkpoint
    def added(state: Any, array: Array) -> Array:
        return layout.array(nnx.merge(graphdef, state).change(layout.matrices(array)).astype(array.dtype))

    return added(state, array)


def _parts_at(module: nnx.Module, name: str) -> list[KernelPart]:
    """Return what adapters add to a parameter of a module."""
    kind, slot = kind_of(module), vars(module).get(KERNEL)
    if slot is None:
        return []
    entries = [entry for entry in vars(slot).values() if isinstance(entry, nnx.Dict)]
    parts = [part for entry in entries for key, part in vars(entry).items() if key == name]
    return parts + (kernel_parts(module) if isinstance(kind, ParameterKind) and kind.parameter == name else [])


def parameter_kernel(module: nnx.Module, path: str, parameter: str = "", axes: str = "") -> Kernel:
    """Return a parameter of a module as a kernel.

    Args:
        module: The module.
        path: The path of the parameter or module, for messages.
        parameter: The name of the parameter. Without it, it is the one that the module's class was registered with.
        axes: A letter for each axis of the parameter in one layer: `i` for rows, `o` for columns, and `b` for a batch
            with one matrix for each entry. Without it, the axes are those that the module's class was registered with,
            or a parameter of two axes is a matrix of shape (in_features, out_features).

    Raises:
        UserError: If the parameter has more than two axes, and `axes` is not given.
    """
    kind = kind_of(module)
    if not axes and (not parameter or (isinstance(kind, ParameterKind) and kind.parameter == parameter)):
        return kernel_of(module, path)
    if not parameter:
        assert kind is not None
        parameter = kind.parameter
    shape = vars(module)[parameter].shape
    if not axes and len(shape) != 2:
        raise UserError(f"{path} cannot be adapted: {_unknown_axes(shape)}")
    return Kernel(path, module, parameter, _layout(axes or "io", shape))


def _unknown_axes(shape: tuple[int, ...]) -> str:
    return (
        f"its shape {shape} does not say which axes are rows and columns: give the rule axes, such as axes='bio' for"
        " one matrix (in, out) for each entry of the first axis"
    )


def _layout(axes: str, shape: tuple[int, ...]) -> Layout:
    rows, columns, batch = (tuple(k for k, c in enumerate(axes) if c == letter) for letter in "iob")
    return Layout(tuple(shape[len(shape) - len(axes) :]), rows, columns, batch)


def check_parameter(kernel: Kernel, method: PartMethod) -> None:
    """Check that a method can be applied at a parameter.

    Raises:
        UserError: If the parameter has half precision, or if the method has dropout.
    """
    dtype = kernel.variable.dtype
    if kernel.quantised:
        raise UserError(
            f"{kernel.path} cannot be adapted: it is quantised, and its module multiplies inside its own methods"
        )
    if dtype not in (jnp.float32, jnp.float64):
        raise UserError(
            f"{kernel.path} cannot be adapted: its module multiplies inside its own methods, where the update is added"
            f" to the parameter, and the sum in {dtype} would round the update away: use float32 parameters"
        )
    if getattr(method, "dropout", 0):
        raise UserError(
            f"{kernel.path} cannot be adapted: dropout={method.dropout} needs the input of the product, which is inside"  # type: ignore[attr-defined]
            " the methods of its module: use dropout=0"
        )
    kernel.matrices()


class ParameterKind(Kind):
    """How a registered class holds a matrix in a parameter that its methods read.

    Args:
        parameter: The name of the parameter.
        axes: The letters of its axes, or a function of the module that returns them.
    """

    mixin = AdaptedParameters
    calls = ()

    def __init__(self, parameter: str, axes: str | Callable[[Any], str]) -> None:
        self.parameter = parameter
        self.axes = axes if callable(axes) else lambda module: axes

    def layout(self, module: Any) -> Layout:
        """Return how the parameter holds matrices, according to the letters of its axes."""
        axes, shape = self.axes(module), vars(module)[self.parameter].shape
        if not axes:
            raise UserError(_unknown_axes(shape))
        return _layout(axes, shape)

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the sizes of the output's feature axes, which are those of the matrix's columns in the parameter."""
        layout = self.layout(module)
        return tuple(layout.shape[axis] for axis in layout.columns)


class AdaptedCall(AdaptedLayer):
    """A module of a registered class whose output includes what adapters add.

    Its output is a contraction with the parameter, plus other terms.
    """

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the module's output, plus what adapters add."""
        kind = kind_of(self)
        assert isinstance(kind, CallKind)
        y = super(AdaptedCall, constant_kernel(self, kind.parameter)).__call__(inputs, *args, **kwargs)  # type: ignore[misc]
        kernel = probed(kernel_value(vars(self)[kind.parameter]))
        equation = kind.equation(self)
        contraction = Contraction.parse(equation)
        product = Product(
            contraction,
            contraction.layout(kernel.shape),
            lambda x, kernel: jnp.einsum(equation, x, kernel),
            lambda x, kernel: jnp.einsum("...i,io->...o", x, kernel),
        )
        own_products_only(self)  # This raises an error if qwix quantises the adapted model.
        with own_products():
            x = inputs.astype(y.dtype)
            terms = product.terms(kernel_parts(self), x, product.multiply(x, kernel.astype(y.dtype)), kernel)
        return sum(terms, start=y)


class CallKind(Kind):
    """How a registered class multiplies its first argument by a parameter in `__call__`, as an equation of einsum.

    Args:
        parameter: The name of the parameter.
        equation: The equation of the contraction, or a function of the module that returns it.
    """

    mixin = AdaptedCall

    def __init__(self, parameter: str, equation: str | Callable[[Any], str]) -> None:
        self.parameter = parameter
        self.equation = equation if callable(equation) else lambda module: equation

    def layout(self, module: Any) -> Layout:
        """Return how the parameter holds matrices, according to the equation."""
        contraction, shape = Contraction.parse(self.equation(module)), vars(module)[self.parameter].shape
        return contraction.layout(tuple(shape[len(shape) - len(contraction.kernel) :]))

    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the sizes of the output's feature axes, which are those of the matrix's columns in the parameter."""
        layout = self.layout(module)
        return tuple(layout.shape[axis] for axis in layout.columns)


def register_kernel(
    cls: type[nnx.Module],
    parameter: str = "kernel",
    *,
    axes: str | Callable[[Any], str] = "io",
    einsum: str | Callable[[Any], str] | None = None,
) -> None:
    """Make the modules of a class, and of its subclasses, adaptable.

    By default, the update is added to the parameter: the methods of the class read `W + M` in its place. This is exact
    for any class, and costs a dense sum in every call. With `einsum`, the update is added to the output of `__call__`,
    and costs what it costs in `nnx.Einsum`.

    >>> import jax.numpy as jnp
    >>> import surm_jax
    >>> class Scorer(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.w = nnx.Param(rngs.params.normal((4, 3)))
    ...
    ...     def __call__(self, x):
    ...         return jnp.tanh(x @ self.w)
    >>> register_kernel(Scorer, "w")
    >>> model, _ = surm_jax.adapt(Scorer(nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.LoRA())], rngs=nnx.Rngs(1))
    >>> model.delta["default"].shape
    (4, 3)

    Args:
        cls: The class.
        parameter: The name of the attribute that holds the parameter.
        axes: A letter for each axis of the parameter in one layer: `i` for the rows of a matrix, `o` for its columns,
            and `b` for a batch with one matrix for each entry, such as "bio" for the experts of a mixture. It may be a
            function of the module.
        einsum: The equation with which `__call__` multiplies its first argument by the parameter, or a function of the
            module that returns it. What `__call__` adds to the product, such as a bias, may not depend on the
            parameter, and nothing may follow the product but sums: `merge(model, example=...)` shows whether this
            holds.

    Raises:
        UserError: If `cls` is not a class of modules, or if `axes` does not name rows and columns.
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise UserError(f"register_kernel needs a class of nnx modules, got {cls!r:.80}")
    if isinstance(axes, str):
        check_axes(axes, "register_kernel")
    KINDS[cls] = ParameterKind(parameter, axes) if einsum is None else CallKind(parameter, einsum)


def check_axes(axes: str, what: str) -> None:
    """Check the letters of the axes of a parameter.

    Raises:
        UserError: If there are other letters than `i`, `o` and `b`, or no `i` or no `o`.
    """
    if not isinstance(axes, str) or set(axes) - set("iob") or not {"i", "o"} <= set(axes):
        raise UserError(
            f"{what}: axes must have a letter for each axis of the parameter, i (rows), o (columns) or b (batch), such"
            f" as 'io' or 'bio', got {axes!r}"
        )


def _of_transposed_convolution(module: Any) -> str:
    return "i" * len(module.kernel_size) + ("oi" if module.transpose_kernel else "io")


KINDS[nnx.ConvTranspose] = ParameterKind("kernel", _of_transposed_convolution)
