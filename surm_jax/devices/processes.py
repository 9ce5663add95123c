"""The processes of one run: how they start, what only the first does, and what all must agree on.

Every process runs the same program on its own devices and its own part of each batch. Only the first (number 0) writes
files and prints, except that Orbax writes from all processes. If one process takes another branch than the others, they
wait for it forever. So all processes must know whatever decides the next step: a signal that one of them got
(`Agreement`), what the first found on the disk (`on_first`), an error (`leave`).
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
from surm_jax.errors import UserError

# Seconds without a heartbeat after which a process counts as dead and the others are stopped.
HEARTBEAT = 30
# Seconds for which processes that stop for the same reason wait for each other.
MEETING = 10
# Seconds that the first process waits before it exits, so that the others can print their messages: they die with it.
LAST_WORDS = 2
# Words in errors which mean that another process is gone. They come from collectives on CPUs and GPUs, and from the
# coordination service.
_LOST = ("Gloo", "NCCL", "coordination service", "CoordinationService", "UNAVAILABLE")
# One day in milliseconds.
_DAY = 24 * 3600 * 1000

Tree = TypeVar("Tree")

_numbers = itertools.count()


def start(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Join the other processes of this run, if there are any. Call it before devices are used.

    Without arguments, JAX recognises the cluster: Slurm, Open MPI, Cloud TPU, GKE or another Kubernetes job. A single
    process is left as it is. After this call, only the first process prints to the standard output and shows warnings.

    Args:
        coordinator: `HOST:PORT` of process 0, which all processes must be able to reach.
        process_id: The number of this process, from 0.
        num_processes: The number of processes.

    Raises:
        UserError: Only some arguments are given, a value is not allowed, or the port is in use. If the other processes
            do not connect within five minutes, JAX itself ends this process with a message.
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
    # `Agreement` already tells all processes of a signal, so that they save at the next step.
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
    """Return whether this process writes and prints: the only process, or the first of several."""
    return private.process_index() == 0


def share(batch_size: int) -> dict[str, int]:
    """Return the arguments with which an input pipeline makes this process's part of each batch.

    >>> share(64)
    {'batch_size': 64, 'process_index': 0, 'process_count': 1}
    """
    count = jax.process_count()
    return {"batch_size": batch_size // count, "process_index": jax.process_index(), "process_count": count}


def whole_on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return the whole array on the host, including parts that only other processes hold.

    Collective: call it from every process, with the arrays in the same order. Arrays that each process holds completely
    are not transferred. It costs one copy.

    >>> whole_on_host(jnp.arange(3))
    array([0, 1, 2], dtype=int32)
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def meet() -> None:
    """Wait for the other processes. Gloo fails if a process is half a minute late for the first collective."""
    if several():
        private.coordination_client().wait_at_barrier(f"surm_jax/meet/{next(_numbers)}", _DAY)


def on_first(action: Callable[[], Any]) -> Any:
    """Run a function only in the first process, while the others wait. Collective: call it from every process.

    Args:
        action: Takes no arguments and returns JSON values. It must not use arrays of which other processes hold parts.

    Returns:
        The value that the function returned, in all processes.

    Raises:
        UserError: The function raised a `UserError` or an `OSError` in the first process. Raised in all processes.
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
        UserError: Entering the context failed in the first process. Raised in all processes.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(context))
        yield


def tree_on_first(tree: Tree) -> Tree | None:
    """Copy the arrays of a tree to the host of the first process; return None in the other processes.

    Collective: call it from every process. A single process gets the arrays as they are.
    """
    if not several():
        return tree
    # Array by array, so that a process that keeps no array holds only one at a time.
    arrays = jax.tree.map(lambda array: whole_on_host(array) if is_first() else whole_on_host(array) is None, tree)
    return arrays if is_first() else None


def union(numbers: set[int], most: int) -> set[int]:
    """Return the union of the sets of all processes. Each set holds at most `most` numbers, none of them negative."""
    if not several() or not most:
        return numbers
    mine = np.full(most, -1, np.int32)
    mine[: len(numbers)] = sorted(numbers)
    return set(np.unique(multihost_utils.process_allgather(mine)).tolist()) - {-1}


class Agreement:
    """A way to tell all processes a number that one of them has, without waiting for the devices.

    Each call returns the largest number that any process passed to the previous call. A single process gets its own
    number at once. Collective: all processes must call it equally often. Each call costs a maximum over one number per
    device.

    Args:
        mesh: All devices of all processes.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Pass a number >= 0; return the largest number of the previous call, or 0 in the first call."""
        if not several():
            return number
        mine = np.full(jax.local_device_count(), number, np.int32)
        before, self._before = self._before, self._largest(jax.make_array_from_process_local_data(self._each, mine))
        return 0 if before is None else int(before)


def leave(message: object, status: int) -> NoReturn:
    """End this process with a message on the standard error.

    If all processes leave, only the first prints its message. A process that leaves while the others stay prints its
    own message and does not wait for the others, which notice that it is gone and stop as well.
    """
    if several():
        try:
            private.coordination_client().wait_at_barrier("surm_jax/leave", MEETING * 1000)
        except Exception:  # The service may raise anything if another process does not come.
            _exit_now(message, status)
    if not is_first():
        sys.exit(status)
    if status == 1:
        sys.exit(str(message))  # Python prints it.
    print(message, file=sys.stderr)
    sys.exit(status)


def leave_for(error: Exception) -> NoReturn:
    """End this process because of an error.

    A `UserError` or an `OSError` is printed as one line, any other error with its traceback. If the error means that
    another process is gone, this process says so and does not wait for the others.
    """
    if several() and is_lost(error):
        _exit_now(
            f"error: another process is gone, so this one stops ({_first_line(error)}). Look for its message;"
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
    """Check the arguments of `start`. Process 0 must also be able to listen at the port."""
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must lie between 0 and {num_processes - 1} (--num_processes - 1)")
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:8476")
    if process_id == 0:
        _require_free(coordinator)
        print(f"waiting at {coordinator} for the other processes, up to five minutes", file=sys.stderr, flush=True)


def _require_free(coordinator: str) -> None:
    # JAX would crash if the port is in use.
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--coordinator={coordinator}: this process cannot listen there ({error})") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
