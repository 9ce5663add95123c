"""Check that only one file uses private names of JAX, and that the installed JAX has these names."""

import importlib
from pathlib import Path

import jax
import pytest

import surm_jax

PACKAGE = Path(surm_jax.__file__).parent
ADVICE = (
    "JAX {version} has moved private names that surm_jax/devices/private.py uses ({what}). Look for the coordination"
    " client in jax/_src/distributed.py (`global_state`) and for the known clusters in jax/_src/clusters/cluster.py"
    " (`ClusterEnv`), or for public functions that have replaced them, and change that one file"
)


def moved(what):
    pytest.fail(ADVICE.format(version=jax.__version__, what=what))


def test_the_private_names_are_where_they_were():
    try:
        private = importlib.import_module("surm_jax.devices.private")
        state, environment = private.distributed.global_state, private.clusters.ClusterEnv
    except (ImportError, AttributeError) as error:
        moved(error)
    for name in ("process_id", "num_processes", "client"):
        if not hasattr(state, name):
            moved(f"global_state.{name}")
    if not environment._cluster_types:
        moved("ClusterEnv._cluster_types is empty")
    for known in environment._cluster_types:
        for name in ("opt_in_only_method", "is_env_present", "get_process_count"):
            if not hasattr(known, name):
                moved(f"{known.__name__}.{name}")
    client = importlib.import_module("jax._src.lib")._jax.DistributedRuntimeClient
    for name in ("wait_at_barrier", "key_value_set", "blocking_key_value_get"):
        if not hasattr(client, name):
            moved(f"DistributedRuntimeClient.{name}")


def test_one_process_is_the_first_and_only_one(monkeypatch):
    private = importlib.import_module("surm_jax.devices.private")
    assert (private.process_index(), private.process_count(), private.coordination_client()) == (0, 1, None)
    assert private.process_count_of_environment() == 1
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "a", "NTASKS": "3", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert private.process_count_of_environment() == 3


def test_no_other_file_has_private_names_of_jax():
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "jax._src" in path.read_text()}
    assert found == {"devices/private.py"}
