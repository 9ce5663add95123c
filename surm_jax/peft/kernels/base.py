"""Kernels: the parameters by which modules multiply, and the kinds of modules that have them.

A `Kind` describes the modules of one class: the name of the parameter, how its array is a matrix or a stack of
matrices, and where the module multiplies by it. Registering a kind (`KINDS`) makes all modules of the class and of its
subclasses adaptable. A `Kernel` is the parameter of one module.
"""

import abc
import contextlib
import contextvars
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.kernels.contraction import Contraction, Layout
from surm_jax.peft.kernels.quantised import is_quantised, kernel_value, own_products, own_products_only
from surm_jax.peft.parts.base import KERNEL, SLOTS, KernelPart, is_adapted, original_class, over_stack
from surm_jax.structured import Dot, Sum, updated_matmul

KINDS: dict[type[nnx.Module], "Kind"] = {}
"""The kinds of kernels, by the class of the modules that have them."""

KNOWN: dict[str, "Kind"] = {}
"""Kinds by the full name of a class of another library, which is registered when a module of it is first seen."""


class AdaptedLayer(nnx.Module):
    """The base class of mixins that add what adapters compute to the product of a module and its kernel."""


class Kind(abc.ABC):
    """How the modules of one class multiply their input by their kernel.

    Attributes:
        parameter: The name of the attribute that holds the kernel.
        mixin: The class that adds the terms of parts. It comes before the module's class among the base classes.
        calls: The names of the methods that multiply by the kernel. A subclass that defines one of them must call the
            method of its parent in it.
        hooks: The names of the attributes to which these methods pass the product. A subclass may not define them.
    """

    parameter: str = "kernel"
    mixin: type[AdaptedLayer]
    calls: tuple[str, ...] = ("__call__",)
    hooks: tuple[str, ...] = ()

    @abc.abstractmethod
    def layout(self, module: Any) -> Layout:
        """Return the `Layout` of a module's kernel, which says how its array holds one matrix or several.

        Raises:
            UserError: If the kernel cannot be adapted. The message is the end of a sentence about the module.
        """

    @abc.abstractmethod
    def widths(self, module: Any) -> tuple[int, ...]:
        """Return the sizes of the last axes of the module's output, which hold its features."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The parameter of one module, seen as a matrix or as a stack of matrices.

    Attributes:
        path: The path of the module or parameter in the model, for messages.
        module: The module.
        parameter: The name of the parameter in the module.
        layout: The layout of the parameter.
    """

    path: str
    module: nnx.Module
    parameter: str
    layout: Layout

    @property
    def variable(self) -> nnx.Variable:
        """The variable that holds the kernel, or what qwix has put in its place. That has a shape and a dtype too."""
        return vars(self.module)[self.parameter]

    @property
    def quantised(self) -> bool:
        """Whether qwix has quantised the kernel. Then it is read only."""
        return is_quantised(self.variable)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the leading axes of the parameter that stack several layers, or () for one layer."""
        try:
            return self.layout.stack(self.variable.shape)
        except UserError as error:
            raise UserError(f"{self.path} cannot be adapted: its kernel {error}") from None

    def matrices(self) -> Float[Array, "*lead in out"]:
        """Return the kernel as matrices of shape (*stack, *entries, in_features, out_features).

        If the module is abstract (`nnx.eval_shape`), the result is a `jax.ShapeDtypeStruct`.

        Raises:
            UserError: If the parameter has another shape than its layout.
        """
        shape = (*self.stack, *self.layout.entries, *self.layout.matrix)
        value = kernel_value(self.variable)
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, value.dtype)  # type: ignore[return-value]  # as in `nnx.eval_shape`
        return self.layout.matrices(jnp.asarray(value))

    def replace(self, matrices: Float[Array, "*lead in out"]) -> None:
        """Replace the kernel of the module, in place, by given matrices in the form of `matrices`."""
        # Make a new variable: other layers may share the old one, and its value may belong to the caller.
        setattr(self.module, self.parameter, self.variable.copy(self.layout.array(matrices)))


def kind_of(module: nnx.Module) -> Kind | None:
    """Return the `Kind` that is registered for a module's class or the nearest parent class, or `None`."""
    for cls in original_class(module).__mro__:
        if cls not in KINDS and (kind := KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")):
            KINDS[cls] = kind
        if cls in KINDS:
            return KINDS[cls]
    return None


def kernel_of(module: nnx.Module, path: str) -> Kernel:
    """Return the kernel of a module whose class is registered.

    Raises:
        UserError: If the module has no kernel that can be adapted.
    """
    kind = kind_of(module)
    if kind is None:
        raise UserError(f"{path} cannot be adapted: the class {type(module).__name__} is not registered as a kernel")
    try:
        return Kernel(path, module, kind.parameter, kind.layout(module))
    except UserError as error:
        raise UserError(f"{path} cannot be adapted: {error}") from None


def check_slots(module: nnx.Module, path: str) -> None:
    """Check that a module has no attributes of its own under the names where adapters put their parts.

    Raises:
        UserError: If it has.
    """
    for name in SLOTS:
        if hasattr(module, name) and not (is_adapted(module) and isinstance(getattr(module, name), nnx.Dict)):
            raise UserError(
                f"{path} cannot be adapted: it has an attribute `{name}` of its own, where parts of adapters go"
            )


def check_product(module: nnx.Module, path: str) -> None:
    """Check that what adapters add would reach the product of a module and its kernel.

    Raises:
        UserError: If a subclass computes the product in another place than the class that is registered, or if the
            kernel cannot be adapted (`kernel_of`).
    """
    kernel = kernel_of(module, path)
    kind = kind_of(module)
    assert kind is not None
    for cls in original_class(module).__mro__:
        if cls in KINDS:
            break
        own = vars(cls)
        problems = [f"{cls.__name__} defines its own {name}" for name in kind.hooks if name in own]
        problems += [
            f"{cls.__name__}.{name} does not call super().{name}"
            for name in kind.calls
            if name in own and not _calls_super(cls, name)
        ]
        if problems:
            parameter = f"{path}/{kernel.parameter}" if path else kernel.parameter
            raise UserError(
                f"{path} cannot be adapted: {problems[0]}, where the update is added; name the parameter instead, as"
                f" {parameter}"
            )
    kernel.matrices()


def own_functions(module: nnx.Module) -> list[str]:
    """Return the names of the attributes in which a module has a function of its own for the product with its kernel.

    Such a function may treat `W + M` in another way than W and M. So the sum of the products, which the module computes
    while it is adapted, need not equal the product with the sum.
    """
    cls = next((cls for cls in original_class(module).__mro__ if cls in KINDS), None)
    if cls is None:
        return []
    usual = inspect.signature(cls.__init__).parameters
    return [
        name
        for name in dict.fromkeys((*KINDS[cls].hooks, "promote_dtype"))
        if vars(module).get(name) not in (None, usual[name].default if name in usual else None)
    ]


def _calls_super(cls: type, name: str) -> bool:
    """Return whether a method of a class calls that of its parent, or is the same function with a wrapper."""
    function = inspect.unwrap(vars(cls)[name])
    return "super" in function.__code__.co_names or function is getattr(cls.__mro__[1], name)


_PROBED: contextvars.ContextVar[bool] = contextvars.ContextVar("probed_kernels", default=False)


@contextlib.contextmanager
def probed_kernels() -> Iterator[None]:
    """Treat the kernels in the products of adapted modules as constants within the `with` block.

    A gradient that still reaches a kernel shows that the model also reads it in another place, where an adapter would
    have no effect.
    """
    token = _PROBED.set(True)
    try:
        yield
    finally:
        _PROBED.reset(token)


def probing() -> bool:
    """Return whether the call is within a `probed_kernels` block."""
    return _PROBED.get()


def probed(kernel: Array) -> Array:
    """Return the kernel, without a gradient within a `probed_kernels` block."""
    return jax.lax.stop_gradient(kernel) if probing() else kernel


def constant_kernel(module: Any, parameter: str) -> Any:
    """Return the module, within a `probed_kernels` block as a shallow copy with the kernel as a constant."""
    if not probing():
        return module
    constant, variable = copy.copy(module), vars(module)[parameter]
    vars(constant)[parameter] = variable.copy(jax.lax.stop_gradient(variable[...]))
    return constant


def kernel_parts(module: nnx.Module) -> list[KernelPart]:
    """Return what adapters add to the product of a module and its kernel, as a list of `KernelPart`."""
    # `nnx.tabulate` replaces `nnx.Dict.values` by a compiled function, and sets another attribute.
    return [part for part in vars(vars(module)[KERNEL]).values() if isinstance(part, KernelPart)]


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of inputs and a kernel, as a module computes it.

    Attributes:
        contraction: The contraction of the unfolded inputs and the kernel.
        layout: The layout of the kernel.
        multiply: The function with which the module multiplies inputs and a kernel, both in their own form.
        dot: The same product for vectors and one matrix.
        unfold: A linear function that is applied to the inputs before the contraction, such as that which returns the
            patches of an image.
        divide: A function that returns an output with its groups of features on an axis of their own.
        join: The inverse of `divide`.
        execution: The execution that replaces `auto`, if another one is known to be the better choice.
    """

    contraction: Contraction
    layout: Layout
    multiply: Callable[[Array, Array], Array]
    dot: Dot
    unfold: Callable[[Array], Array] = lambda x: x
    divide: Callable[[Array], Array] = lambda y: y
    join: Callable[[Array], Array] = lambda y: y
    execution: str = "auto"

    def vectors(self, x: Float[Array, "..."]) -> Float[Array, "... in"]:
        """Return the inputs as vectors of input features, so that a matrix can multiply them."""
        return self.contraction.vectors(self.unfold(x))

    def outputs(self, y: Float[Array, "... out"]) -> Float[Array, "..."]:
        """Return vectors of output features in the form of the module's output. This is the way back from `vectors`."""
        return self.join(self.contraction.outputs(y, self.layout.divided or self.layout.shape))

    def adapted(self, module: nnx.Module, x: Float[Array, "..."], kernel: Any) -> Array:
        """Return the product of inputs and a module's kernel, plus what adapters add to it.

        Args:
            module: The adapted module.
            x: The inputs, in the module's own form.
            kernel: The array of the kernel, or what qwix has put in its place.
        """
        parts = kernel_parts(module)
        if own_products_only(module):
            frozen = self.multiply(x, kernel)
            with own_products():
                return functools.reduce(jnp.add, self.terms(parts, x, frozen, kernel_value(kernel)), frozen)
        kernel = probed(kernel)
        matrix = self.layout.matrices(kernel)
        sums = [(part, None if self.layout.entries else part.plain_matrix()) for part in parts]
        plain = [(part, update) for part, update in sums if update is not None]
        others = [part for part, update in sums if update is None]
        if plain:
            total = plain[0][1] if len(plain) == 1 else Sum(tuple(update for _, update in plain))
            execution = plain[0][0].execution
            y = updated_matmul(
                x,
                matrix,
                total,
                execution=self.execution if execution == "auto" else execution,
                dot=lambda x, matrix: self.multiply(x, self.layout.array(matrix)),
                vectors=self.vectors,
                outputs=self.outputs,
            )
        if others:
            # These parts get the product with the frozen kernel, without the terms of other adapters, as in training.
            frozen = self.multiply(x, kernel)
            y = functools.reduce(jnp.add, self.terms(others, x, frozen, kernel), y if plain else frozen)
        return y

    def terms(self, parts: list[KernelPart], x: Array, frozen: Array, kernel: Array) -> list[Array]:
        """Return what the parts add to `frozen`, the product of the inputs and the kernel."""
        arrays = self.vectors(x), self.contraction.results(self.divide(frozen)), self.layout.matrices(kernel)
        return [
            self.outputs(over_stack(lambda part, *arrays: part.added(*arrays, self.dot), part, *arrays))
            for part in parts
        ]


class Hooked(AdaptedLayer):
    """A module that computes the product with its kernel in one of its attributes, such as `dot_general`.

    That attribute is replaced, so that its result includes what adapters add. All that the module or a subclass does
    before and after the product stays the same.
    """

    hook: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "hook" in vars(cls):
            setattr(cls, cls.hook, _hook_property(cls.hook))

    def product(self, base: Callable[..., Array] | None, *args: Any, **options: Any) -> Array:
        """Return what `base` returns for the same arguments, plus what adapters add.

        Args:
            base: The module's own attribute, which computes the product.
            *args: The arguments that the module passes to it.
            **options: The keyword arguments that the module passes to it.
        """
        raise NotImplementedError


def _hook_property(name: str) -> property:
    def get(self: Hooked) -> Callable[..., Array]:
        return functools.partial(self.product, vars(self)[name])

    def put(self: Hooked, base: Callable[..., Array] | None) -> None:
        vars(self)[name] = base

    return property(get, put, doc=f"The module's own `{name}`, which also adds the terms of the parts.")
