"""The device mesh with its axes `data` and `fsdp`, and the sharding of all arrays of a run over it.

The batch is split over both axes. The large arrays of the frozen base model are split over `fsdp`. The trained arrays,
the optimiser's state and small arrays are replicated. A split array is gathered just before it is used, in the forward
pass and again in the backward pass, so that no device ever holds the whole base model. This is fully sharded data
parallelism (arXiv 1910.02054, stage 3), applied to the frozen weights.
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
# Arrays of the base model with fewer elements are replicated. Splitting them would save too little memory to be worth
# the communication.
SMALLEST_SPLIT = 2**14
# Names of the JAX primitives whose outputs are not kept for the backward pass. The first one gathers a split array. The
# others make copies of a gathered array in another shape or dtype.
_NOT_KEPT = ("sharding_constraint", "reshape", "convert_element_type", "transpose", "squeeze", "broadcast_in_dim")
# `_IN_BLOCKS` matches the beginning of the path of every array inside a block. `_STACKED` matches only if the array is
# stacked, so that it holds the arrays of several equal blocks along its first axis.
_IN_BLOCKS = re.compile(r"blocks/")
_STACKED = re.compile(r"blocks/\d+/stacked/")

AnyMesh = Mesh | AbstractMesh
Tree = TypeVar("Tree")


def make_mesh(data: int, batch_sizes: dict[str, int], fsdp: int = 1) -> jax.sharding.Mesh:
    """Return a device mesh of `data` times `fsdp` devices, after checking that the batch sizes fit it.

    The devices are ordered by process. Thus the devices of one process are neighbours in the mesh, and its rows of a
    batch are neighbours in the batch.

    Args:
        data: The number of devices along the axis `data`, which splits only the batch. 0 means the number of all
            devices divided by `fsdp`.
        batch_sizes: A dictionary of batch sizes that must be divisible by the number of devices. Its keys are the
            configuration keys that error messages name.
        fsdp: The number of devices along the axis `fsdp`, which also splits the large arrays of the base model.

    Raises:
        UserError: There are too few devices, a batch size is not divisible by the number of devices, or a run with
            several processes would leave devices unused.
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
    """Return the sharding with which every device holds the whole array, as for trained arrays and small weights."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of the arrays of a batch, which splits their first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def base_sharding(mesh: AnyMesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a frozen array of a given shape.

    Let k be the number of devices along `fsdp`. Of the axes with a length that is a multiple of k, the longest is split
    over these devices. If there is no such axis, or if the array has fewer than 2**14 elements, it is replicated. Here,
    the first array is split along its first axis, and the second is too small:

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
    """Move the frozen arrays of a model to the devices of the mesh, each with its `base_sharding`.

    An array that is stacked over several blocks is sharded like the array of a single block, slice by slice.
    """

    def sharding(path: tuple, leaf: jax.Array) -> NamedSharding:
        if not _STACKED.match(_name(path)):
            return base_sharding(mesh, leaf.shape)
        return NamedSharding(mesh, PartitionSpec(None, *base_sharding(mesh, leaf.shape[1:]).spec))

    return jax.device_put(frozen, jax.tree.map_with_path(sharding, frozen))


def gathered(tree: Tree, mesh: AnyMesh) -> Tree:
    """Gather all split arrays of a pytree on every device. Use this inside a compiled function."""

    def gather(leaf: jax.Array) -> jax.Array:
        if base_sharding(mesh, leaf.shape).is_fully_replicated:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, replicated(mesh))

    return jax.tree.map(gather, tree)


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Return whether to keep the output of a primitive for the backward pass. This is a policy for `jax.checkpoint`.

    It keeps all outputs except gathered arrays and copies of them.
    """
    return primitive.name not in _NOT_KEPT


def with_whole_base(fn: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """Return a version of `fn(trained, frozen, *rest)` that works if the arrays in `frozen` are split over devices.

    The frozen arrays outside the blocks are gathered before `fn` is called. Each block gathers its own arrays when it
    runs (`surm_jax.training.blocks`).
    """
    if mesh.shape[FSDP_AXIS] == 1:
        return fn

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf if _IN_BLOCKS.match(_name(path)) else gathered(leaf, mesh)

    return lambda trained, frozen, *rest: fn(trained, jax.tree.map_with_path(gather, frozen), *rest)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Make the sharded arrays of a whole batch from the rows that each process has loaded.

    Args:
        batch: This process's rows of the batch, as host arrays by name.
        mesh: The device mesh.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
