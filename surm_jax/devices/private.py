"""The only file that uses private names of JAX: `jax._src.distributed` and `jax._src.clusters`.

JAX has no public function that returns the client of the coordination service that `jax.distributed.initialize` starts,
or the cluster that it would recognise. Orbax takes the client from the same place. If these names move,
`tests/devices/test_private.py` fails and says what to do.
"""

from typing import Any

from jax._src import clusters, distributed


def process_index() -> int:
    """Return the number of this process in its run, from 0, without initialising devices."""
    return distributed.global_state.process_id


def process_count() -> int:
    """Return the number of processes of this run, without initialising devices."""
    return distributed.global_state.num_processes or 1


def coordination_client() -> Any:
    """Return the client of the coordination service.

    It has `wait_at_barrier(name, milliseconds)`, `key_value_set(key, text)` and `blocking_key_value_get(key,
    milliseconds)`. It is None in a run of one process.
    """
    return distributed.global_state.client


def process_count_of_environment() -> int:
    """Return the number of processes that `jax.distributed.initialize()` would find in the environment.

    The known clusters are Slurm, Open MPI, Cloud TPU, GKE and other Kubernetes jobs. Outside of them, the number is 1.
    """
    known = [env for env in clusters.ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present()]
    return known[0].get_process_count() if known else 1
