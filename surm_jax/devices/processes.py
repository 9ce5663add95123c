"""The processes of one run: starting them, what the first alone does, and what all of them must agree on.

Every process runs the same program on its own devices and its own part of each batch. The first (number 0) alone writes
and speaks; Orbax alone writes from all. Whatever decides what comes next must be the same for all, since a process that
turns off leaves the others waiting for it: a signal that one of them got (`Agreement`), what the first found on the
disk (`on_first`), an error (`leave`).

What is not about arrays goes through the coordination service that `jax.distributed` starts. JAX keeps its client to
itself, and Orbax takes it from the same place.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from surm_jax.devices.gather import whole
from surm_jax.errors import UserError

# Seconds without a sign of life after which a process counts as dead, and the others are stopped.
HEARTBEAT = 30
# Seconds in which processes that stop for the same reason find each other.
MEETING = 10
# Seconds that the first process, which the others cannot do without, leaves them to say what they have to say.
LAST_WORDS = 2
# Of errors that mean that another process is gone: the collectives of CPUs, of GPUs, and the coordination service.
_LOST = ("Gloo", "NCCL", "coordination service", "CoordinationService", "UNAVAILABLE")
_DAY = 24 * 3600 * 1000

Tree = TypeVar("Tree")

_numbers = itertools.count()


def start(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Joins the other processes of this run, if there are any. To be called before anything else asks for a device.

    Without arguments, what JAX recognises counts: Slurm, Open MPI, Cloud TPU, GKE and other Kubernetes jobs; one
    process there is left as it is. Of all processes but the first, the standard output and warnings are dropped from
    here on.

    Args:
        coordinator: host and port of process 0, which all can reach.
        process_id: the number of this process, from 0.
        num_processes: how many there are.

    Raises:
        UserError: if only some are given, they make no sense, or the port is in use. Where the others do not come
            within five minutes, JAX itself ends the process with a message.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    if absent := [f"--{name}" for name, value in given.items() if value is None]:
        if len(absent) < len(given):
            raise UserError(
                "several processes need all of --coordinator=HOST:PORT, --process_id=I and --num_processes=N, but"
                f" {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
            )
        if _processes_of_environment() < 2:
            return
    elif not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must lie between 0 and {num_processes - 1} (--num_processes - 1)")
    elif not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, of process 0, such as 10.0.0.1:8476")
    elif process_id == 0:
        _require_free(coordinator)
        print(f"waiting at {coordinator} for the other processes, up to five minutes", file=sys.stderr, flush=True)
    # A signal is agreed on here, and saves at the very next step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=coordinator,
        process_id=process_id,
        num_processes=num_processes,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives.
        warnings.simplefilter("ignore")


def several() -> bool:
    """Whether this run has more than one process."""
    return distributed.global_state.num_processes > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks: the only one, or the first of several."""
    return distributed.global_state.process_id == 0


def share(batch_size: int) -> dict[str, int]:
    """Returns what the input pipelines must know of this process to make its part of batches of this size.

    >>> share(64)
    {'batch_size': 64, 'process_index': 0, 'process_count': 1}
    """
    count = jax.process_count()
    return {"batch_size": batch_size // count, "process_index": jax.process_index(), "process_count": count}


def meet() -> None:
    """Waits for the other processes: gloo gives up if one comes half a minute late to its first collective."""
    if several():
        distributed.global_state.client.wait_at_barrier(f"surm_jax/meet/{next(_numbers)}", _DAY)


def on_first(action: Callable[[], Any]) -> Any:
    """Does something in the first process alone, while the others wait; all of them must call it.

    Args:
        action: must ask nothing of the other processes: no work on arrays that they have parts of.

    Returns:
        What it returned, JSON values, in all processes.

    Raises:
        UserError: in all processes, if it was raised in the first.
    """
    if not several():
        return action()
    client, key = distributed.global_state.client, f"surm_jax/on_first/{next(_numbers)}"
    if is_first():
        try:
            told = {"value": action()}
        except (UserError, OSError) as error:
            told = {"error": str(error)}
        client.key_value_set(key, json.dumps(told))
    else:
        told = json.loads(client.blocking_key_value_get(key, _DAY))
    if "error" in told:
        raise UserError(told["error"])
    return told.get("value")


@contextlib.contextmanager
def opened_on_first(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """Enters a context in the first process alone, while the others wait; what it raises there is raised in all.

    Raises:
        UserError: see `on_first`.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(context))
        yield


def tree_on_first(tree: Tree) -> Tree | None:
    """Brings arrays to the first process, whose host then holds all of them, and returns None in the others.

    All processes must ask. A process alone gets the arrays as they are.
    """
    if not several():
        return tree
    # Array by array: a process that does not keep them has one at a time.
    arrays = jax.tree.map(lambda array: whole(array) if is_first() else whole(array) is None, tree)
    return arrays if is_first() else None


def union(numbers: set[int], most: int) -> set[int]:
    """Returns what any process has, to all of them; each brings at most `most` numbers, not negative."""
    if not several() or not most:
        return numbers
    mine = np.full(most, -1, np.int32)
    mine[: len(numbers)] = sorted(numbers)
    return set(np.unique(multihost_utils.process_allgather(mine)).tolist()) - {-1}


class Agreement:
    """Tells every process of a number that one of them has, without waiting for the devices.

    Each call gives the largest number that any process brought to the call before. A process alone gets its own at
    once. All processes must call it equally often, and every call has work for the devices: a maximum over one number
    each.

    Args:
        mesh: all devices of all processes.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Brings this process's number, not negative, and returns the largest of the call before (at first: 0)."""
        if not several():
            return number
        mine = np.full(jax.local_device_count(), number, np.int32)
        before, self._before = self._before, self._largest(jax.make_array_from_process_local_data(self._each, mine))
        return 0 if before is None else int(before)


def leave(message: object, status: int) -> NoReturn:
    """Ends this process with a message on the standard error.

    What all processes leave for, the first alone says. One that leaves alone says so itself, and goes without the
    others' consent: they find it gone, and stop as well.
    """
    if several():
        try:
            distributed.global_state.client.wait_at_barrier("surm_jax/leave", MEETING * 1000)
        except Exception:  # Whatever the service raises if somebody does not come.
            _go_alone(message, status)
    if not is_first():
        sys.exit(status)
    if status == 1:
        sys.exit(str(message))  # Python prints it.
    print(message, file=sys.stderr)
    sys.exit(status)


def leave_for(error: Exception) -> NoReturn:
    """Ends this process because of an error: what the user can put right is one message, anything else is shown whole.

    Where the error says that another process is gone, this one says so, and goes alone.
    """
    if several() and is_lost(error):
        _go_alone(
            f"error: another process is gone, so this one stops ({_first_line(error)}). If it said why, look at that;"
            " the same command goes on from the last checkpoint",
            1,
        )
    foreseen = isinstance(error, UserError | OSError)
    leave(f"error: {error}" if foreseen else "".join(traceback.format_exception(error)), 1)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that another process is gone."""
    while error is not None:
        if any(word in str(error) for word in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _go_alone(message: object, status: int) -> NoReturn:
    state = distributed.global_state
    print(f"process {state.process_id} of {state.num_processes}: {message}", file=sys.stderr, flush=True)
    if is_first():
        time.sleep(LAST_WORDS)
    # The proper way out would wait for the others.
    os._exit(status)


def _require_free(coordinator: str) -> None:
    # JAX would crash.
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--coordinator={coordinator}: this process cannot listen there ({error})") from None


def _processes_of_environment() -> int:
    # JAX looks for these itself, but has no way to ask what it would find.
    known = [env for env in clusters.ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present()]
    return known[0].get_process_count() if known else 1


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
