"""Launches several processes of one run on this machine. Each is forked from a server that has imported everything."""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).resolve().parents[2]
# Seconds within which all processes must have ended.
PATIENCE = 120


class End(NamedTuple):
    """How a process ended: its exit status (negative: the signal), when, and what it printed, but for gloo's hello."""

    status: int
    time: float
    out: str
    err: str


def launch_all(
    folder: Path, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], devices: int
) -> list[End]:
    """Launches a process for each command line of `launch.py`, and waits until all have ended.

    Args:
        folder: for what they print, and for the programs they compile: whoever starts again finds them.
        commands: the arguments of each.
        environments: variables for each, beside those of this process.
        devices: how many each has.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.processes_job", "launch"])
    started = [
        context.Process(target=_child, args=(folder, number, arguments, environment, devices))
        for number, (arguments, environment) in enumerate(zip(commands, environments, strict=True))
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


def _child(folder: Path, number: int, arguments: Sequence[str], environment: Mapping[str, str], devices: int) -> None:
    """What `python launch.py` does, with an import behind it."""
    for descriptor, path in zip((1, 2), _outputs(folder, number), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
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
    try:
        runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")
    finally:
        # multiprocessing would leave out what JAX does at the end.
        atexit._run_exitfuncs()


def _outputs(folder: Path, number: int) -> list[Path]:
    return [folder / f"{name}-{number}" for name in ("out", "err")]


def _printed(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(True) if not line.startswith("[Gloo]"))
