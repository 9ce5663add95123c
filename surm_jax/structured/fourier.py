"""Circular convolution by FFT, kept local to each device's part of the batch.

Under `jax.jit`, XLA does not partition an FFT along its batch dimensions: with activations sharded over a mesh it
gathers all of them on every device, forward and backward, although the output's sharding looks right
(https://github.com/jax-ml/jax/issues/15680). So every FFT over activations goes through `batch_local`, which runs it in
`jax.shard_map`, where nothing can be gathered.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from surm_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which a batch is sharded, in this order."""


def batch_local(fn: Callable[..., Array]) -> Callable[..., Array]:
    """Makes `fn(x, *replicated)` work on each device's part of the batch alone.

    The leading dimension of `x` and of the result is the batch; the other arguments are small and the same on every
    device, and their gradients are summed over the devices. `fn` itself must treat the examples independently, and `x`
    must have at least one dimension besides the batch for the wrapping to take place.

    The mesh is the one set by `jax.set_mesh`. Of its `BATCH_AXES`, an `Auto` axis shards the leading dimension, an
    `Explicit` one does where the type of `x` says so, and a `Manual` one has already done so (we are inside a
    `jax.shard_map`). `fn` is called directly when no axis is left, when `x` has rank 1, and when the axes do not divide
    the leading dimension (in a batch that cannot be sharded evenly there is nothing to keep local). Under `jax.vmap`
    the mapped dimension is invisible here: keep the batch as the leading dimension instead of mapping over it.

    Returns:
        A function of the same arguments with the same value and gradients, for `jit` and for eager use.
    """

    @functools.wraps(fn)
    def local(x: Array, *replicated: Array) -> Array:
        axes = _batch_axes(x)
        if not axes:
            return fn(x, *replicated)
        specs = (P(axes), *(P() for _ in replicated))
        return jax.shard_map(fn, in_specs=specs, out_specs=P(axes), axis_names=set(axes))(x, *replicated)

    return local


def circular_convolve(x: Float[Array, "*batch m"], c: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    """Circular convolution over the last axis: `y_j = sum_i x_i c_{(j-i) mod n}`, computed as `F y = F x * F c`.

    Args:
        x: (..., m) with m <= n; padded with zeros to n.
        c: (n,), the same dtype as `x`.

    Returns:
        (..., n) in the dtype of `x`: float32 or float64, the two that `jnp.fft` knows.

    Cost: two real FFTs of length n for each row of `x` and one for `c`, O(n log n) a row. Reverse mode keeps the
    spectra of `x` and `c`; `jax.checkpoint` around the call keeps `x` and `c` alone.

    Raises:
        UserError: `x` is wider than `c`, or the dtypes differ or are not float32 or float64.

    >>> circular_convolve(jnp.array([0.0, 1.0, 0.0]), jnp.array([1.0, 2.0, 3.0])).round().astype(jnp.int32)
    Array([3, 1, 2], dtype=int32)
    """
    if x.ndim == 0 or c.ndim != 1 or x.shape[-1] > c.shape[0]:
        raise UserError(
            f"circular_convolve: x (..., m) and c (n,) need m <= n, but have shapes {x.shape} and {c.shape}"
        )
    if x.dtype != c.dtype or x.dtype not in (jnp.float32, jnp.float64):
        raise UserError(f"circular_convolve: x and c must both be float32 or both float64, not {x.dtype} and {c.dtype}")
    return _convolve_rows(x, c)


@batch_local
def _convolve_rows(x: Float[Array, "*batch m"], c: Float[Array, " n"]) -> Float[Array, "*batch n"]:
    n = c.shape[0]
    spectrum = jnp.expand_dims(jnp.fft.rfft(c), tuple(range(x.ndim - 1)))
    # Without its length, irfft returns n - 1 numbers for every odd n.
    return jnp.fft.irfft(jnp.fft.rfft(x, n=n) * spectrum, n=n)


def _batch_axes(x: Array) -> tuple[str, ...]:
    """The mesh axes over which `batch_local` splits the leading dimension of `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim < 2:
        return ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # shard_map asserts that its specs repeat what the types of explicit axes already say, their order included.
    leading = jax.typeof(x).sharding.spec[0] or ()
    typed = (leading,) if isinstance(leading, str) else tuple(leading)
    explicit = tuple(axis for axis in typed if axis in BATCH_AXES and types[axis] == AxisType.Explicit)
    axes = explicit + tuple(axis for axis in BATCH_AXES if types.get(axis) == AxisType.Auto)
    return axes if x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
