"""Two methods as users may write them, each with a part class of its own. Nothing in the package refers to them.

`Modulation` multiplies the entries of a kernel, and `Gate` multiplies the output of a module by a non-linear gate.
Neither of them adds a structured matrix.
"""

import dataclasses

import jax
import jax.numpy as jnp

from surm_jax.peft import AdapterParam, KernelPart, OutputPart, PartMethod, at_least
from surm_jax.peft.parts.dropout import drop


def like(row, x):
    """Return the vector `row` with the dtype and the number of dimensions of x, to scale the last axis of x by it."""
    return row.astype(x.dtype).reshape((1,) * (x.ndim - 1) + row.shape)


class ModulationPart(KernelPart):
    """The part of `Modulation`, which changes the kernel W to `W * (1 + u v^T)` with an entry-wise product.

    It adds `x @ (W * u v^T) = ((x * u) @ W) * v` to `x @ W`.
    """

    def __init__(self, u, v, dropout):
        super().__init__()
        self.dropout = dropout
        self.u, self.v = AdapterParam(u), AdapterParam(v)

    @property
    def shape(self):
        return self.u.shape[0], self.v.shape[0]

    def _added(self, x, y, kernel, dot):
        moved = dot(drop(x, self.dropout) * like(self.u[...], x), kernel)
        return moved * like(self.v[...], moved)

    def _change(self, kernel):
        return kernel.astype(jnp.float32) * jnp.outer(self.u[...], self.v[...])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modulation(PartMethod):
    """An entry-wise product of the kernel and `1 + u v^T`, with in_features + out_features parameters."""

    name = "modulation"
    part = ModulationPart
    target = "qkv"
    scale: float = 1.0
    dropout: float = at_least(0.0, 0, below=1)

    def make_part(self, place, key):
        m, n = place.kernel.shape
        return ModulationPart(jnp.zeros(m), self.scale * jax.random.normal(key, (n,)), self.dropout)


class GatePart(OutputPart):
    """The part of `Gate`, which changes the output y to `y * (1 + tanh(g))`: it adds `y * tanh(g)`."""

    def __init__(self, width):
        super().__init__()
        self.g = AdapterParam(jnp.zeros(width))

    @property
    def shape(self):
        return self.g.shape[0], self.g.shape[0]

    def _added(self, y):
        return y * like(jnp.tanh(self.g[...]), y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(PartMethod):
    """A gate at the output of modules, with one parameter for each feature."""

    name = "gate"
    part = GatePart
    target = "houlsby"

    def make_part(self, place, key):
        return GatePart(place.width)
