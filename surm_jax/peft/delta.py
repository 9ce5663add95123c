"""The LoRA-style update: a linear layer computes `base(x) + factor * x @ dW` with a structured matrix dW.

An adapted layer keeps its parameters where they were (`.../kernel`, `.../bias`) and gains those of the update beside
them (`.../delta/r1`, ...), so that checkpoints, sharding rules and path patterns hold before and after adaptation. To
this end its class becomes a subclass of what it was: `isinstance(layer, nnx.Linear)` stays true, and so do its
attributes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.peft.layers import matrix_view
from surm_jax.structured import Scaled, StructuredMatrix, check_execution, updated_matmul


class AdapterParam(nnx.Param):
    """A parameter that an adapter brought. This type selects what is trained; it is float32 over any base."""


class Delta(nnx.Module):
    """A structured matrix whose arrays are `AdapterParam`s under the names that the matrix gives them.

    Args:
      matrix: the update dW, of shape (in_features, out_features).
      factor: the number it is multiplied with.
      execution: how the product is computed, one of `surm_jax.structured.EXECUTIONS`.
    """

    def __init__(self, matrix: StructuredMatrix, factor: float, execution: str = "auto"):
        check_execution(execution)
        arrays = matrix.arrays()
        self.execution = execution
        self.factor = factor
        self.names = tuple(arrays)
        # The matrix with nothing in it: its family and its static sizes.
        self.empty = nnx.static(matrix.with_arrays(**dict.fromkeys(arrays)))
        for name, array in arrays.items():
            setattr(self, name, AdapterParam(array))

    def matrix(self) -> StructuredMatrix:
        """Returns dW as it is now."""
        return self.empty.with_arrays(**{name: getattr(self, name)[...] for name in self.names})


class Adapted(nnx.Module):
    """What an adapted linear layer gains. Mixed into its class by `attach`, taken out again by `detach`.

    The update is added where a linear layer multiplies with its kernel: in its `dot_general`, the place that Flax keeps
    open for other products. What the layer does before and after it, such as the bias, or the activation of a subclass
    around `super().__call__`, is as it will be once the update is merged.
    """

    delta: Delta

    @property
    def dot_general(self) -> Callable[..., Array]:
        """The layer's product, with the update beside the kernel."""
        return functools.partial(_updated_dot_general, self)

    @dot_general.setter
    def dot_general(self, base: Callable[..., Array] | None) -> None:
        vars(self)["dot_general"] = base

    @property
    def dot_general_cls(self) -> None:
        """Hides that of `nnx.LinearGeneral`, which would be used instead of `dot_general`."""

    @dot_general_cls.setter
    def dot_general_cls(self, base: Callable[[], Callable[..., Array]] | None) -> None:
        vars(self)["dot_general_cls"] = base


def _updated_dot_general(layer: Adapted, inputs: Array, kernel: Array, _dimensions: Any, **options: Any) -> Array:
    """`inputs` times `kernel + factor * dW`, where the layer would multiply `inputs` with `kernel` alone."""
    own = vars(layer)
    base = own["dot_general_cls"]() if own.get("dot_general_cls") else own["dot_general"] or jax.lax.dot_general
    out_sharding = options.pop("out_sharding", None)
    view, delta = matrix_view(layer, type(layer).__name__), layer.delta

    def dot(x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "*batch out"]:
        return base(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)

    update = Scaled(delta.matrix(), delta.factor)
    x, kernel = view.vectors(inputs), kernel.reshape(view.shape)
    y = view.outputs(updated_matmul(x, kernel, update, execution=delta.execution, dot=dot))
    return y if out_sharding is None else jax.reshard(y, out_sharding)


@functools.cache
def _adapted_class(base: type[nnx.Module]) -> type[Adapted]:
    root = nnx.LinearGeneral if issubclass(base, nnx.LinearGeneral) else nnx.Linear
    bases = (Adapted, base) if base is root else (base, _adapted_class(root))
    return type(f"Adapted{base.__name__}", bases, {"base_class": base, "__doc__": f"{base.__name__} + delta."})


def attach(layer: nnx.Module, delta: Delta) -> None:
    """Turns a linear layer into an adapted one, in place."""
    _set_class(layer, _adapted_class(type(layer)))
    layer.delta = delta


def detach(layer: Adapted) -> None:
    """Turns an adapted layer back into what it was, in place."""
    del layer.delta
    _set_class(layer, type(layer).base_class)


def _set_class(layer: nnx.Module, cls: type) -> None:
    # Past nnx's own __setattr__, which would note `__class__` as one of the layer's attributes.
    object.__setattr__(layer, "__class__", cls)
