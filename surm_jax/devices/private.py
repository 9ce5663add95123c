"""The functions that need private modules of JAX, `jax._src.distributed` and `jax._src.clusters`.

No other file uses private names of JAX. `jax.distributed.initialize` starts a coordination service and recognises the
cluster in which a program runs, but JAX has no public function that returns the client of the service, or the cluster.
Orbax takes the client from the same private module. If JAX moves these names, `tests/devices/test_private.py` fails
and says what to do.
"""

from typing import Any

from jax._src import clusters, distributed


def process_index() -> int:
    """Return the index of this process in its run, counted from 0, without initialising JAX's devices."""
    return distributed.global_state.process_id


def process_count() -> int:
    """Return the number of processes of this run, without initialising JAX's devices."""
    return distributed.global_state.num_processes or 1


def coordination_client() -> Any:
    """Return the client of JAX's coordination service, through which the processes of a run exchange messages.

    The client has the methods `wait_at_barrier(name, milliseconds)`, `key_value_set(key, text)` and
    `blocking_key_value_get(key, milliseconds)`. In a run of one process the result is None.
    """
    return distributed.global_state.client


def process_count_of_environment() -> int:
    """Return the number of processes that `jax.distributed.initialize()` without arguments would find.

    JAX recognises Slurm, Open MPI, Cloud TPU, GKE and other Kubernetes jobs by environment variables. Outside of such a
    cluster, the number is 1.
    """
    known = [env for env in clusters.ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present()]
    return known[0].get_process_count() if known else 1
