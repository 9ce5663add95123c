"""Run programs in processes of their own on this machine, such as several processes of one run of `launch.py`.

To start fast, each process is forked from a server process that has already imported all modules.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).resolve().parents[2]
# Time in seconds after which all processes must have ended.
PATIENCE = 300


class End(NamedTuple):
    """How a process ended.

    Attributes:
        status: The exit status, or the negative number of the signal that killed the process.
        time: The value of `time.monotonic()` when the process ended.
        out: The text on the standard output, without the lines that Gloo prints when it connects.
        err: The text on the standard error, without these lines.
    """

    status: int
    time: float
    out: str
    err: str


def launch_all(
    folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], devices: int
) -> list[End]:
    """Launch `launch.py` in several processes, and wait until all of them have ended.

    Args:
        folder: The folder for the output of the processes and for their cache of compiled programs. A later launch with
            the same folder uses this cache.
        commands: The command-line arguments of each process.
        environments: Environment variables of each process, in addition to those of this process.
        devices: The number of devices of each process.
    """
    pairs = zip(commands, environments, strict=True)
    return _run_all(folder, [partial(_launch, folder, *pair, devices) for pair in pairs])


def run_module(folder: Path, module: str, *arguments: str) -> End:
    """Run `python -m MODULE ARGUMENTS` from the root of the repository, with its output in files of a folder."""
    (end,) = _run_all(folder, [partial(_run_module, module, arguments)])
    return end


def _run_all(folder: Path, programs: Sequence[Callable[[], None]]) -> list[End]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.processes_job", "launch"])
    started = [
        context.Process(target=_child, args=(folder, number, program)) for number, program in enumerate(programs)
    ]
    until, times = time.monotonic() + PATIENCE, {}
    try:
        for process in started:
            process.start()
        running = {process.sentinel: number for number, process in enumerate(started)}
        while running and time.monotonic() < until:
            for sentinel in connection.wait(list(running), timeout=1):
                times[running.pop(sentinel)] = time.monotonic()
        ends = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
    printed = [[_printed(path) for path in _outputs(folder, number)] for number in range(len(started))]
    assert None not in ends, f"not all have ended: {ends} {printed}"
    return [End(status, times[number], *printed[number]) for number, status in enumerate(ends)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _child(folder: Path, number: int, program: Callable[[], None]) -> None:
    """Run a program in a forked process, in which all modules are already imported."""
    for descriptor, path in zip((1, 2), _outputs(folder, number), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    try:
        program()
    finally:
        # multiprocessing does not call the functions that JAX has registered with `atexit`. Call them here.
        atexit._run_exitfuncs()


def _run_module(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _launch(folder: Path, arguments: Sequence[str], environment: Mapping[str, str], devices: int) -> None:
    os.environ.update(environment)
    settings: dict[str, Any] = {
        "jax_num_cpu_devices": devices,
        "jax_compilation_cache_dir": str(folder / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    sys.argv = ["launch.py", *arguments]
    runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")


def _outputs(folder: Path, number: int) -> list[Path]:
    return [folder / f"{name}-{number}" for name in ("out", "err")]


def _printed(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(True) if not line.startswith("[Gloo]"))
