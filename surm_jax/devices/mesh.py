"""The device mesh: both axes split the batch, and `fsdp` also splits the large arrays of the frozen base.

Trained arrays, their optimiser and small arrays are replicated. A split array is gathered where it is used, in the
forward pass and again in the backward pass, so that no device ever keeps the whole base (fully sharded data
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
# Smaller arrays are replicated: the memory that a split saves is not worth a message.
SMALLEST_SPLIT = 2**14
# Outputs that the backward pass computes again: gathered arrays, and their copies in other shapes and dtypes.
_NOT_KEPT = ("sharding_constraint", "reshape", "convert_element_type", "transpose", "squeeze", "broadcast_in_dim")
# Paths of the frozen arrays of blocks, and of the arrays that hold several equal blocks along their first axis.
_IN_BLOCKS = re.compile(r"blocks/")
_STACKED = re.compile(r"blocks/\d+/stacked/")

AnyMesh = Mesh | AbstractMesh
Tree = TypeVar("Tree")


def make_mesh(data: int, batch_sizes: dict[str, int], fsdp: int = 1) -> jax.sharding.Mesh:
    """Return a mesh of `data` times `fsdp` devices.

    The devices of a process are neighbours, in the order of the processes, and so are its rows of a batch.

    Args:
        data: Number of devices along the axis that only splits the batch; 0: as many as there are.
        batch_sizes: Batch sizes that the mesh must divide, by their key of the configuration.
        fsdp: Number of devices along the axis that also splits the base.

    Raises:
        UserError: There are fewer devices, a batch size does not divide over them, or a process would have fewer of
            them than another.
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
    """Return the sharding of an array of the frozen base: along the longest axis that divides, or none if it is small.

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
    """Put the frozen arrays on their devices. An array of stacked layers is split as an array of one layer would be."""

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
    """Keep everything but gathered arrays and their copies in other forms: a policy for `jax.checkpoint`."""
    return primitive.name not in _NOT_KEPT


def with_whole_base(fn: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """Return `fn(trained, frozen, *rest)` for a frozen base that is split.

    Arrays outside the blocks are gathered before `fn` uses them. Every block gathers its own, in the forward pass and
    again in the backward pass (`surm_jax.training.blocks`).
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
