"""The LoRA-style update: a linear layer computes `base(x) + factor * x @ dW` with a structured matrix dW.

An adapted layer keeps its parameters where they were (`.../kernel`, `.../bias`) and gains those of the update beside
them (`.../delta/r1`, ...), so that checkpoints, sharding rules and path patterns hold before and after adaptation. To
this end its class becomes a subclass of what it was: `isinstance(layer, nnx.Linear)` stays true, and so do its
attributes.
"""

import functools

from flax import nnx
from jaxtyping import Array, Float

from surm_jax.peft.layers import matrix_view
from surm_jax.structured import StructuredMatrix


class AdapterParam(nnx.Param):
    """A parameter that an adapter brought. This type selects what is trained; it is float32 over any base."""


class Delta(nnx.Module):
    """A structured matrix whose arrays are `AdapterParam`s under the names that the matrix gives them.

    Args:
      matrix: the update dW, of shape (in_features, out_features).
      factor: the number it is multiplied with.
    """

    def __init__(self, matrix: StructuredMatrix, factor: float):
        arrays = matrix.arrays()
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

    In a subclass of `nnx.Linear` with its own `__call__` it comes between the two: what the subclass does around
    `super().__call__`, such as an activation, applies to the updated product, as it will once the update is merged.
    """

    delta: Delta

    def __call__(self, inputs: Float[Array, "..."], *args, **kwargs) -> Float[Array, "..."]:
        """Computes the base layer's output plus the update's, in the base output's dtype."""
        view = matrix_view(self, type(self).__name__)
        y = super().__call__(inputs, *args, **kwargs)
        update = self.delta.factor * self.delta.matrix().apply(view.vectors(inputs))
        return y + view.outputs(update).astype(y.dtype)


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
