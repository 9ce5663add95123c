"""The device mesh: both axes split the batch, and `fsdp` also splits the large arrays of the frozen base.

Trained arrays, the optimiser's state and small arrays are replicated. A split array is gathered where it is used, in
the forward pass and again in the backward pass, so that no device ever keeps the whole base (fully sharded data
parallelism, arXiv 1910.02054, stage 3, for the frozen weights).
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from surm_jax.devices.batch import BATCH_AXES
from surm_jax.errors import UserError

FSDP_AXIS = BATCH_AXES[1]
# Arrays with fewer elements are replicated: splitting them would save less memory than the communication is worth.
SMALLEST_SPLIT = 2**14
# Primitives whose outputs the backward pass recomputes: the gathering of arrays, and copies in other shapes and dtypes.
_NOT_KEPT = ("sharding_constraint", "reshape", "convert_element_type", "transpose", "squeeze", "broadcast_in_dim")
# Paths of the frozen arrays of blocks, and of the arrays that hold several equal blocks along their first axis.
_IN_BLOCKS = re.compile(r"blocks/")
_STACKED = re.compile(r"blocks/\d+/stacked/")

AnyMesh = Mesh | AbstractMesh
Tree = TypeVar("Tree")


def make_mesh(data: int, batch_sizes: dict[str, int], fsdp: int = 1) -> jax.sharding.Mesh:
    """Return a mesh of `data` times `fsdp` devices.

    The devices are ordered by process, so that the devices of each process, and its rows of a batch, are contiguous.

    Args:
        data: Number of devices along the axis that splits only the batch. 0: all devices, divided by `fsdp`.
        batch_sizes: The batch sizes that must divide over the mesh, by their configuration key.
        fsdp: Number of devices along the axis that also splits the base.

    Raises:
        UserError: There are too few devices, a batch size does not divide over them, or several processes would not use
            all of their devices.
    """
    available = jax.device_count()
    data = data or max(1, available // fsdp)
    size = data * fsdp
    if size > available:
        raise UserError(
            f"config.mesh asks for more devices (data={data} times fsdp={fsdp}) than there are ({available})"
        )
    if size < available and jax.process_count() > 1:
        raise UserError(
            f"config.mesh leaves out devices (data={data} times fsdp={fsdp} of {available}), but {jax.process_count()}"
            " processes use all that they have: leave data at 0, or start fewer processes"
        )
    for key, batch_size in batch_sizes.items():
        if batch_size % size:
            below = batch_size // size * size
            near = f"{below} or {below + size}" if below else f"{size}"
            raise UserError(
                f"{key}={batch_size} does not divide over {size} devices: take {near},"
                " or fewer devices (config.mesh.data, config.mesh.fsdp)"
            )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[:size]
    return jax.sharding.Mesh(np.array(devices).reshape(data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds completely: adapters, optimiser state, small weights."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of batches: along their first axis, over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def base_sharding(mesh: AnyMesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a frozen array: along the longest axis that divides over `fsdp`, or none if it is small.

    >>> mesh = make_mesh(1, {}, fsdp=4)
    >>> base_sharding(mesh, (768, 12, 64)).spec, base_sharding(mesh, (768,)).spec
    (P('fsdp',), P())
    """
    fsdp = mesh.shape[FSDP_AXIS]
    dividing = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not dividing or np.prod(shape) < SMALLEST_SPLIT:
        return replicated(mesh)
    longest = max(dividing, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(None,) * longest, FSDP_AXIS))


def put_base(frozen: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Put the frozen arrays on the mesh. The slices of a stacked array are split like the array of a single block."""

    def sharding(path: tuple, leaf: jax.Array) -> NamedSharding:
        if not _STACKED.match(_name(path)):
            return base_sharding(mesh, leaf.shape)
        return NamedSharding(mesh, PartitionSpec(None, *base_sharding(mesh, leaf.shape[1:]).spec))

    return jax.device_put(frozen, jax.tree.map_with_path(sharding, frozen))


def gathered(tree: Tree, mesh: AnyMesh) -> Tree:
    """Gather the split arrays of the base on every device, inside a compiled program."""

    def gather(leaf: jax.Array) -> jax.Array:
        if base_sharding(mesh, leaf.shape).is_fully_replicated:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, replicated(mesh))

    return jax.tree.map(gather, tree)


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Tell `jax.checkpoint`, as its policy, to keep all outputs except gathered arrays and copies of them."""
    return primitive.name not in _NOT_KEPT


def with_whole_base(fn: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """Return a version of `fn(trained, frozen, *rest)` that works with a split frozen base.

    Arrays outside the blocks are gathered before `fn` uses them. Each block gathers its own arrays, in the forward pass
    and again in the backward pass (`surm_jax.training.blocks`).
    """
    if mesh.shape[FSDP_AXIS] == 1:
        return fn

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf if _IN_BLOCKS.match(_name(path)) else gathered(leaf, mesh)

    return lambda trained, frozen, *rest: fn(trained, jax.tree.map_with_path(gather, frozen), *rest)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Put this process's part of a batch on its devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
