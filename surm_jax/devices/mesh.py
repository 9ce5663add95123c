"""The device mesh: both its axes split the batch; over `fsdp` the large arrays of the frozen base are split as well.

What is trained, its optimiser and small arrays are replicated. A split array is put together where it is used, in the
forward pass and once more in the backward pass, so that no device ever keeps the whole base
(fully sharded data parallelism: arXiv 1910.02054, stage 3, for the frozen weights).
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from surm_jax.devices.batch import BATCH_AXES
from surm_jax.errors import UserError

FSDP_AXIS = BATCH_AXES[1]
# Smaller arrays are replicated: what a split saves is not worth a message.
SMALLEST_SPLIT = 2**14
# What the backward pass makes anew: arrays put together, and their copies in other shapes and dtypes.
_NOT_KEPT = ("sharding_constraint", "reshape", "convert_element_type", "transpose", "squeeze", "broadcast_in_dim")
# Frozen arrays of the blocks, and those that hold the arrays of several equal blocks, one after the other.
_IN_BLOCKS = re.compile(r"blocks/")
_STACKED = re.compile(r"blocks/\d+/stacked/")

Tree = TypeVar("Tree")


def make_mesh(data: int, batch_sizes: dict[str, int], fsdp: int = 1) -> jax.sharding.Mesh:
    """Returns a mesh of `data` times `fsdp` devices.

    Those of a process lie together, in the order of the processes, and so do its rows of a batch.

    Args:
        data: devices along the axis that only splits the batch; 0: as many as there are.
        batch_sizes: the sizes that the mesh must divide, by the key of the configuration that has them.
        fsdp: devices along the axis over which the base is split as well.

    Raises:
        UserError: if there are fewer devices, a batch size does not divide over them, or one of several processes would
            have none of them, or fewer than another.
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


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: weights, adapters, optimiser state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of batches: split along their first axis, over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def base_sharding(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of the frozen base: along its longest axis that divides, or none where it is small.

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
    """Puts the frozen arrays where they belong; those of stacked layers are split as each layer alone would be."""

    def sharding(path: tuple, leaf: jax.Array) -> NamedSharding:
        if not _STACKED.match(_name(path)):
            return base_sharding(mesh, leaf.shape)
        return NamedSharding(mesh, PartitionSpec(None, *base_sharding(mesh, leaf.shape[1:]).spec))

    return jax.device_put(frozen, jax.tree.map_with_path(sharding, frozen))


def whole(tree: Tree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Tree:
    """Puts split arrays of the base together, inside of a program."""

    def gathered(leaf: jax.Array) -> jax.Array:
        if base_sharding(mesh, leaf.shape).is_fully_replicated:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, replicated(mesh))

    return jax.tree.map(gathered, tree)


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: keeps all but arrays that were put together, and their copies in other forms."""
    return primitive.name not in _NOT_KEPT


def with_whole_base(fn: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """Returns `fn(trained, frozen, *rest)` for a frozen base that is split.

    What lies outside of the blocks is put together when `fn` uses it; every block puts itself together, in the forward
    pass and once more in the backward pass (`surm_jax.training.blocks`).
    """
    if mesh.shape[FSDP_AXIS] == 1:
        return fn

    def gathered(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf if _IN_BLOCKS.match(_name(path)) else whole(leaf, mesh)

    return lambda trained, frozen, *rest: fn(trained, jax.tree.map_with_path(gathered, frozen), *rest)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
