"""Let each device compute only its own part of a sharded batch.

Under `jax.jit`, XLA does not partition an FFT along its batch dimensions. If the activations are sharded over a mesh,
XLA gathers all of them on every device, in the forward and in the backward pass, although the sharding of the output
looks right (https://github.com/jax-ml/jax/issues/15680). `batch_local` runs a function in `jax.shard_map` instead,
where nothing is gathered.
"""

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")
"""The names of the mesh axes over which a batch is sharded, in this order."""


def batch_local(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Return a version of a function in which each device computes its own part of the batch.

    The mesh is the one that `jax.set_mesh` set. The leading dimension of `x` is split over the mesh axes in
    `BATCH_AXES`: over axes of the type `Auto`, and over those of the type `Explicit` that the type of `x` names for
    this dimension. Axes of the type `Manual` are left out, because a surrounding `jax.shard_map` has already split the
    batch over them.

    `fn` is called directly if there is no such axis, if `x` has fewer than two dimensions, or if the number of devices
    does not divide the leading dimension. `jax.vmap` hides the mapped dimension, so do not map over the batch.

    Args:
        fn: A function `fn(x, *replicated)`. The leading dimension of `x` and of the result is the batch, and `fn` must
            treat the examples independently. The other arguments are small arrays that are the same on every device.
            Their gradients are summed over the devices.

    Returns:
        A function of the same arguments with the same value and gradients. It works with and without `jax.jit`.
    """

    @functools.wraps(fn)
    def local(x: Array, *replicated: Array) -> Array:
        axes = _batch_axes(x)
        if not axes:
            return fn(x, *replicated)

        def on_part(x: Array, *replicated: Array) -> Array:
            # `pcast` marks an array as different on each device. In the backward pass, JAX sums the gradient over the
            # devices at this place. Do it here, where the arrays are small. Otherwise JAX does it where `fn` combines
            # them with `x`, perhaps after they were expanded to a dense matrix.
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
    # `shard_map` requires that its specs name the explicit axes in the same order as the type of `x`.
    leading = jax.typeof(x).sharding.spec[0] or ()
    typed = (leading,) if isinstance(leading, str) else tuple(leading)
    explicit = tuple(axis for axis in typed if axis in BATCH_AXES and types[axis] == AxisType.Explicit)
    axes = explicit + tuple(axis for axis in BATCH_AXES if types.get(axis) == AxisType.Auto)
    return axes if x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
