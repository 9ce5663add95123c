"""The LoRA-style update: a linear layer computes `x @ (W + sum of alpha * dW)` with structured matrices dW.

An adapted layer keeps its parameters where they were (`.../kernel`, `.../bias`) and gains those of the updates beside
them (`.../delta/<adapter>/r1`, ...), so that checkpoints, sharding rules and path patterns hold before and after. To
this end its class becomes a subclass of what it was: `isinstance(layer, nnx.Linear)` stays true, and so do its
attributes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.peft.kernels import matrix_view
from surm_jax.peft.methods.base import Update
from surm_jax.peft.parts.context import drop, drops
from surm_jax.peft.parts.stored import StoredMatrix
from surm_jax.peft.parts.variables import AdapterParam, AdapterScale
from surm_jax.structured import Dot, StructuredMatrix, Sum, check_execution, matmul, updated_matmul


class Delta(StoredMatrix):
    """The update of one layer by one adapter.

    Args:
        update: the method, with its settings.
        matrix: the matrix dW, of shape (in_features, out_features).
        kernel: the layer's, as a matrix of that shape; read for updates that start from its norms.
        execution: how the product is computed, one of `surm_jax.structured.EXECUTIONS`.
    """

    def __init__(self, update: Update, matrix: StructuredMatrix, kernel: jax.Array, execution: str = "auto") -> None:
        check_execution(execution)
        super().__init__(matrix, update.frozen)
        self.execution = execution
        self.dropout = update.dropout
        self.factor = update.unit(matrix.shape) if update.learn_alpha else update.factor(matrix.shape)
        self.scale = AdapterScale(jnp.ones((), jnp.float32))
        if update.learn_alpha:
            self.alpha = AdapterParam(jnp.asarray(update.alpha, jnp.float32))
        if update.normalized:
            self.magnitude = AdapterParam(_norms(kernel.astype(jnp.float32)))

    def matrix(self) -> StructuredMatrix:
        """Returns what is added to the kernel now, `alpha * dW` times the scale; without DoRA's normalisation.

        It is the multiple of the smallest form of dW, which is what files hold, so that a loaded update computes the
        same bits.
        """
        alpha = self.alpha[...] if hasattr(self, "alpha") else 1.0
        return self.stored().compact().absorb(self.factor * alpha * (1.0 if self.normalized else self.scale[...]))

    @property
    def normalized(self) -> bool:
        """Whether columns of `W + dW` are brought to learned magnitudes (DoRA)."""
        return hasattr(self, "magnitude")

    @property
    def simple(self) -> bool:
        """Whether this is `x @ matrix()` in this call, without normalisation or dropout."""
        return not self.normalized and not (self.dropout and drops())

    def tensors(self) -> dict[str, nnx.Variable]:
        """Returns the variables that are saved, by name."""
        names = [*self.names, *(name for name in ("alpha", "magnitude") if hasattr(self, name))]
        return {name: getattr(self, name) for name in names}

    def change(self, kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Returns what the update adds to the kernel, as a dense float32 matrix."""
        dense = self.matrix().to_dense().astype(jnp.float32)
        if not self.normalized:
            return dense
        kernel = kernel.astype(jnp.float32)
        return self.scale[...] * (self.gain(kernel, dense)[None, :] * (kernel + dense) - kernel)

    def outputs(self, x: Array, y: Array, kernel: Array, dot: Dot) -> Array:
        """Returns what the update adds to the output `y = x @ kernel` where that is not `simple`.

        DoRA (arXiv 2402.09353, equation 5): `m / ||W + dW|| * x @ (W + dW)`, the norms of columns, taken as constants
        by the gradient (section 4.3).
        """
        matrix = self.matrix()
        moved = matmul(drop(x, self.dropout), matrix, execution=self.execution, dot=dot).astype(y.dtype)
        if not self.normalized:
            return moved
        gain = self.gain(kernel, matrix.to_dense())
        gain = jnp.expand_dims(gain, tuple(range(y.ndim - 1)))
        return (self.scale[...] * (gain * (y + moved).astype(jnp.float32) - y.astype(jnp.float32))).astype(y.dtype)

    def gain(self, kernel: Float[Array, "in out"], dense: Float[Array, "in out"]) -> Float[Array, "out"]:
        """Returns what the columns of `kernel + dense` are multiplied with where they are normalised, in float32.

        A column of zeros has no direction, and stays zero.
        """
        norms = jax.lax.stop_gradient(_norms(kernel.astype(jnp.float32) + dense.astype(jnp.float32)))
        return self.magnitude[...] / jnp.where(norms == 0, 1.0, norms)


def _norms(kernel: Float[Array, "in out"]) -> Float[Array, "out"]:
    """Euclidean norm of every column, which is one output feature."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=0))


class Adapted(nnx.Module):
    """What an adapted linear layer gains: updates by the name of their adapter. See `surm_jax.peft.parts.attach`.

    The updates are added where a linear layer multiplies with its kernel: in its `dot_general`, the place that Flax
    keeps open for other products. What the layer does before and after it, such as the bias, or the activation of a
    subclass around `super().__call__`, is as it will be once the update is merged.
    """

    delta: nnx.Dict[Delta]

    @property
    def dot_general(self) -> Callable[..., Array]:
        """The layer's product, with the updates beside the kernel."""
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
    """`inputs` times the kernel with its updates, where the layer would multiply `inputs` with `kernel` alone."""
    own = vars(layer)
    base = own["dot_general_cls"]() if own.get("dot_general_cls") else own["dot_general"] or jax.lax.dot_general
    out_sharding = options.pop("out_sharding", None)
    view, deltas = matrix_view(layer, type(layer).__name__), list(layer.delta.values())

    def dot(x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "*batch out"]:
        return base(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)

    x, kernel = view.vectors(inputs), kernel.reshape(view.shape)
    simple = [delta for delta in deltas if delta.simple]
    others = [delta for delta in deltas if delta not in simple]
    # Updates that are not simple look at the frozen product alone, as each does when it is trained.
    y = frozen = dot(x, kernel) if others or not simple else None
    if simple:
        update = simple[0].matrix() if len(simple) == 1 else Sum([delta.matrix() for delta in simple])
        y = updated_matmul(x, kernel, update, execution=simple[0].execution, dot=dot)
    for delta in others:
        y = y + delta.outputs(x, frozen, kernel, dot)
    y = view.outputs(y)
    return y if out_sharding is None else jax.reshard(y, out_sharding)
