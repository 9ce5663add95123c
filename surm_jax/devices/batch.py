"""Computation on each device's part of a batch, without gathering the parts.

Under `jax.jit`, XLA does not partition an FFT along its batch dimensions: with activations sharded over a mesh it
gathers all of them on every device, forward and backward, although the output's sharding looks right
(https://github.com/jax-ml/jax/issues/15680). `batch_local` runs a function in `jax.shard_map`, where nothing is
gathered.
"""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which a batch is sharded, in this order."""


def batch_local(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Return a version of `fn(x, *replicated)` that computes each device's part of the batch on that device.

    The leading dimension of `x` and of the result is the batch. The other arguments are small and the same on every
    device; their gradients are summed over the devices. `fn` must treat the examples independently.

    The mesh is the one that `jax.set_mesh` set. An `Auto` axis among its `BATCH_AXES` shards the leading dimension. An
    `Explicit` axis does so if the type of `x` says so. A `Manual` axis has already done so: the call is inside a
    `jax.shard_map`. `fn` is called directly if no axis is left, if `x` has rank 1, and if the axes do not divide the
    leading dimension: a batch that cannot be sharded evenly has no local parts. Under `jax.vmap` the mapped dimension
    is invisible here, so keep the batch as the leading dimension instead of mapping over it.

    Returns:
        A function of the same arguments with the same value and gradients, for `jit` and for eager use.
    """

    @functools.wraps(fn)
    def local(x: Array, *replicated: Array) -> Array:
        axes = _batch_axes(x)
        if not axes:
            return fn(x, *replicated)

        def on_part(x: Array, *replicated: Array) -> Array:
            # JAX sums gradients where an array stops being the same on all devices. Do it here, where the arrays are
            # small, and not where they meet `x`, perhaps as a dense matrix.
            return fn(x, *jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), replicated))

        specs = (P(axes), *(P() for _ in replicated))
        return jax.shard_map(on_part, in_specs=specs, out_specs=P(axes), axis_names=set(axes))(x, *replicated)

    return local


def _batch_axes(x: Array) -> tuple[str, ...]:
    """Return the mesh axes over which `batch_local` splits the leading dimension of `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim < 2:
        return ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # shard_map requires its specs to repeat what the types of explicit axes say, in the same order.
    leading = jax.typeof(x).sharding.spec[0] or ()
    typed = (leading,) if isinstance(leading, str) else tuple(leading)
    explicit = tuple(axis for axis in typed if axis in BATCH_AXES and types[axis] == AxisType.Explicit)
    axes = explicit + tuple(axis for axis in BATCH_AXES if types.get(axis) == AxisType.Auto)
    return axes if x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
