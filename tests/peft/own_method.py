"""Two methods as a user would write them, each with its own part: nothing in the package knows of them.

`Modulation` multiplies a kernel entry by entry, and `Gate` multiplies an output by a non-linear gate. Neither adds a
structured matrix to anything.
"""

import dataclasses

import jax
import jax.numpy as jnp

from surm_jax.peft import AdapterParam, KernelPart, OutputPart, PartMethod, at_least
from surm_jax.peft.parts.dropout import drop


def like(row, x):
    """Return a vector with as many axes as x, in its dtype, to be multiplied with the last axis."""
    return row.astype(x.dtype).reshape((1,) * (x.ndim - 1) + row.shape)


class ModulationPart(KernelPart):
    """A kernel `W * (1 + u v^T)`, entry by entry: the part adds `x @ (W * u v^T) = ((x * u) @ W) * v`."""

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
    """Entry-wise modulation of a kernel by a matrix of rank one, in + out numbers."""

    name = "modulation"
    part = ModulationPart
    target = "qkv"
    scale: float = 1.0
    dropout: float = at_least(0.0, 0, below=1)

    def make_part(self, place, key):
        m, n = place.kernel.shape
        return ModulationPart(jnp.zeros(m), self.scale * jax.random.normal(key, (n,)), self.dropout)


class GatePart(OutputPart):
    """An output `y * (1 + tanh(g))`: the part adds `y * tanh(g)`."""

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
    """A gate at the output of modules, one number for each feature."""

    name = "gate"
    part = GatePart
    target = "houlsby"

    def make_part(self, place, key):
        return GatePart(place.width)
