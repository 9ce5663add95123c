"""The processes of one run: how they start, exchange information and stop.

Every process runs the same program on its own devices, with its own rows of each batch. Only the first process (index
0) writes files and prints. The exception is Orbax, which writes checkpoints from all processes.

If one process took another branch of the program than the others, they would wait for it forever. So whatever decides
what comes next must be shared: `Agreement` shares a signal that one process got, `on_first` shares what the first
process found on the disk, and `leave` ends all processes together.
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
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from surm_jax.devices import private
from surm_jax.errors import UserError, first_line

# Seconds without a heartbeat after which JAX considers a process dead and stops the others.
HEARTBEAT = 30
# Longest time in seconds that a process waits for the others when it ends (`leave`).
MEETING = 10
# Seconds that the first process waits before it exits early. The other processes die with it, and in this time they can
# still print their messages.
LAST_WORDS = 2
# An error message that contains one of these words means that another process is gone. Gloo runs the collectives on
# CPUs, and NCCL on GPUs.
_LOST = ("Gloo", "NCCL", "coordination service", "CoordinationService", "UNAVAILABLE")
# One day in milliseconds.
_DAY = 24 * 3600 * 1000

Tree = TypeVar("Tree")

_numbers = itertools.count()


def start(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Connect this process with the other processes of its run, if there are any.

    Call it before JAX's devices are used. Without arguments, the processes are found if JAX recognises the cluster
    (Slurm, Open MPI, Cloud TPU, GKE or another Kubernetes job). If there is only one process, this does nothing. With
    several processes, only the first one prints to the standard output and shows warnings from now on.

    Args:
        coordinator: The address `HOST:PORT` at which process 0 listens, and which all processes must be able to reach.
        process_id: The index of this process, counted from 0.
        num_processes: The number of processes.

    Raises:
        UserError: Only some of the arguments are given, a value is not allowed, or the port is in use. If the other
            processes do not connect within five minutes, JAX itself ends this process with a message.
    """
    if coordinator is not None and process_id is not None and num_processes is not None:
        _require_place(coordinator, process_id, num_processes)
    else:
        given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
        absent = [f"--{name}" for name, value in given.items() if value is None]
        if len(absent) < len(given):
            raise UserError(
                "several processes need all of --coordinator=HOST:PORT, --process_id=I and --num_processes=N, but"
                f" {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
            )
        if private.process_count_of_environment() < 2:
            return
    # JAX's preemption service would also catch signals. It is not needed: when one process gets a signal, `Agreement`
    # shares it, and all processes save a checkpoint and stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=coordinator,
        process_id=process_id,
        num_processes=num_processes,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Open as long as the process lives.
        warnings.simplefilter("ignore")


def several() -> bool:
    """Return whether this run has more than one process."""
    return private.process_count() > 1


def is_first() -> bool:
    """Return whether this is the first or the only process, which writes files and prints."""
    return private.process_index() == 0


def share(batch_size: int) -> dict[str, int]:
    """Return this process's share of a batch, as arguments for the data pipelines of `surm_jax.data`.

    `batch_size` in the result is the number of rows of this process. A single process makes the whole batch:

    >>> share(64)
    {'batch_size': 64, 'process_index': 0, 'process_count': 1}
    """
    count = jax.process_count()
    return {"batch_size": batch_size // count, "process_index": jax.process_index(), "process_count": count}


def whole_on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return a whole array as a NumPy array, including the parts that are only on devices of other processes.

    Collective: call it from every process, with the arrays in the same order. Only arrays that are split over processes
    are transferred.

    >>> whole_on_host(jnp.arange(3))
    array([0, 1, 2], dtype=int32)
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def meet() -> None:
    """Wait until all processes of the run have called this function.

    Call it before the first collective operation. Gloo, JAX's library for them on CPUs, fails if a process is half a
    minute late.
    """
    if several():
        private.coordination_client().wait_at_barrier(f"surm_jax/meet/{next(_numbers)}", _DAY)


def on_first(action: Callable[[], Any]) -> Any:
    """Run a function only in the first process, while the others wait. Collective: call it from every process.

    Args:
        action: A function without arguments that returns a value that JSON can represent. It must not use arrays that
            are partly on devices of other processes.

    Returns:
        The value that `action` returned in the first process. All processes return it.

    Raises:
        UserError: `action` raised a `UserError` or an `OSError` in the first process. All processes raise this error.
            In a run of one process, the error of `action` is raised as it is.
    """
    if not several():
        return action()
    client, key = private.coordination_client(), f"surm_jax/on_first/{next(_numbers)}"
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
    """Enter a context only in the first process, while the others wait. Collective: call it from every process.

    Raises:
        UserError: Entering the context failed in the first process. All processes raise this error.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(context))
        yield


def tree_on_first(tree: Tree) -> Tree | None:
    """Return a pytree with whole host copies of all arrays in the first process, and None in the other processes.

    Collective: call it from every process. In a run of one process, the pytree is returned unchanged.
    """
    if not several():
        return tree
    # Copy the arrays one by one, and drop each at once in the other processes, so that these hold only one at a time.
    arrays = jax.tree.map(lambda array: whole_on_host(array) if is_first() else whole_on_host(array) is None, tree)
    return arrays if is_first() else None


def union(numbers: set[int], most: int) -> set[int]:
    """Return the union of the sets that all processes pass.

    Collective: call it from every process.

    Args:
        numbers: This process's set of integers >= 0.
        most: The largest size that any process's set can have, the same in all processes.
    """
    if not several() or not most:
        return numbers
    mine = np.full(most, -1, np.int32)
    mine[: len(numbers)] = sorted(numbers)
    return set(np.unique(multihost_utils.process_allgather(mine)).tolist()) - {-1}


def all_agree(flag: bool) -> bool:
    """Return whether all processes pass True. Collective: call it from every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag)))) if several() else flag


class Agreement:
    """Shares a number, such as a signal that one process got, with all processes of a run.

    Each call takes a number and returns the largest number that any process passed to the previous call. Because the
    result belongs to the previous call, no call waits for the devices. In a run of one process, each call returns its
    own number.

    Collective: all processes must call it equally often. Each call computes, on the devices, the maximum of an array
    that has one element for each device.

    Args:
        mesh: The mesh of all devices of all processes.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Pass a number >= 0. Return the largest number that any process passed to the previous call (at first 0)."""
        if not several():
            return number
        mine = np.full(jax.local_device_count(), number, np.int32)
        before, self._before = self._before, self._largest(jax.make_array_from_process_local_data(self._each, mine))
        return 0 if before is None else int(before)


def leave(message: object, status: int) -> NoReturn:
    """End this process with a message on the standard error.

    If all processes call this function within 10 seconds, only the first one prints its message. Otherwise each prints
    its own and ends. Processes that did not call it notice that another is gone, and stop as well.

    Args:
        message: The message.
        status: The exit status of the process.
    """
    if several():
        try:
            private.coordination_client().wait_at_barrier("surm_jax/leave", MEETING * 1000)
        except Exception:  # If another process does not come, the service may raise any type of error.
            _exit_now(message, status)
    if not is_first():
        sys.exit(status)
    if status == 1:
        sys.exit(str(message))  # Python prints the message and uses the status 1.
    with contextlib.suppress(OSError):  # Perhaps nobody reads the standard error any more.
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def leave_for(error: Exception) -> NoReturn:
    """End this process because of an error, with an error message and exit status 1.

    For a `UserError` or an `OSError`, only the message of the error is printed. For any other error, the traceback is
    printed, too. If the error means that another process is gone, this process prints that and does not wait for the
    others.
    """
    if several() and is_lost(error):
        _exit_now(
            f"error: another process is gone, so this one stops ({first_line(error)}). Look for its message;"
            " the same command goes on from the last checkpoint",
            1,
        )
    foreseen = isinstance(error, UserError | OSError)
    leave(f"error: {error}" if foreseen else "".join(traceback.format_exception(error)), 1)


def is_lost(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, means that another process is gone."""
    while error is not None:
        if any(word in str(error) for word in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_now(message: object, status: int) -> NoReturn:
    place = f"process {private.process_index()} of {private.process_count()}"
    print(f"{place}: {message}", file=sys.stderr, flush=True)
    if is_first():
        time.sleep(LAST_WORDS)
    # The usual exit would wait for the other processes.
    os._exit(status)


def _require_place(coordinator: str, process_id: int, num_processes: int) -> None:
    """Check the arguments of `start`. Process 0 also checks that it can listen at the port, and prints that it waits.

    Raises:
        UserError: An argument is not allowed, or the port is in use.
    """
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must lie between 0 and {num_processes - 1} (--num_processes - 1)")
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:8476")
    if process_id == 0:
        _require_free(coordinator)
        print(f"waiting at {coordinator} for the other processes, up to five minutes", file=sys.stderr, flush=True)


def _require_free(coordinator: str) -> None:
    # Check it here, because JAX crashes if the port is in use.
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--coordinator={coordinator}: this process cannot listen there ({error})") from None
