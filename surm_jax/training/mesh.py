"""The device mesh: its axis `data` splits the batch; everything else is replicated."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from surm_jax.errors import UserError
from surm_jax.structured import BATCH_AXES

DATA_AXIS = BATCH_AXES[0]


def make_mesh(data: int, batch_sizes: dict[str, int]) -> jax.sharding.Mesh:
    """Returns a mesh over `data` devices (0: all).

    Args:
      data: how many devices.
      batch_sizes: the sizes that the mesh must divide, by the key of the configuration that has them.

    Raises:
      UserError: if there are fewer devices, or a batch size does not divide over them.
    """
    if jax.process_count() > 1:
        raise UserError(f"a run is one process for now, this is one of {jax.process_count()}")
    available = jax.device_count()
    size = data or available
    if size > available:
        raise UserError(f"config.mesh.data={size} asks for more devices than there are ({available})")
    for key, batch_size in batch_sizes.items():
        if batch_size % size:
            below = batch_size // size * size
            near = f"{below} or {below + size}" if below else f"{size}"
            raise UserError(
                f"{key}={batch_size} does not divide over {size} devices: take {near},"
                " or fewer devices (config.mesh.data)"
            )
    return jax.make_mesh((size,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: weights, adapters, optimiser state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of batches: split along their first axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
