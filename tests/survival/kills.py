"""Runs of the tiny job that are killed over and over: `python -m tests.survival.kills FOLDER CHAINS KILLS STEPS SEED`.

Importing JAX takes longer than the runs do, so this process imports everything, and forks for every start of
`launch.py` before JAX has a device or a thread. `FOLDER/whole` gets a run that nothing disturbs, `FOLDER/killed-<n>`
one for each chain: it is killed, started again, killed, and so on, and at last left alone. Chains run side by side.
A run that completes before its kill is kept as `FOLDER/complete-<n>`, and the chain goes on with a new one.

Half of the kills come at any time of a run's life, the others soon after it began to write a checkpoint. Prints a line
for each.
"""

import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, logging

from surm_jax import __main__ as launch
from tests.training import tiny, tiny_job  # noqa: F401 - tiny_job imports what the configuration needs, before forks.


def start(folder: Path, workdir: Path, steps: int) -> int:
    """Starts, or goes on with, a run that saves every step; returns its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        log = os.open(folder / f"log-of-{workdir.name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.set_verbosity(logging.FATAL)
        values = {"optim.steps": steps, "log.metrics_every": 1, "log.evaluate_every": 5, "log.checkpoint_every": 1}
        config = [f"--config.{key}={value}" for key, value in values.items()]
        sys.argv = ["launch.py", f"--config=tests/training/tiny_job.py:{folder}", f"--workdir={workdir}", *config]
        guarded = functools.partial(functools.partial, launch.guarded)
        app.run(guarded(launch.main), flags_parser=guarded(launch.parse_flags))
    except SystemExit as end:
        status = end.code or 0
    finally:
        os._exit(status)


def is_over(pid: int) -> bool:
    """Whether a process has ended, which it may do in one way only."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status:
        sys.exit(f"a run ended with the status {status} by itself")
    return bool(done)


def moments(rng: random.Random, whole: float, workdir: Path) -> Callable[[], bool]:
    """Returns what says that the time to kill has come."""
    began = time.monotonic()
    if rng.random() < 0.5:
        moment = rng.uniform(0, whole)
        return lambda: time.monotonic() - began > moment
    saves, delay, seen = rng.randint(1, 4), rng.uniform(0, 0.03), {}

    def is_time() -> bool:
        for path in (workdir / "checkpoints").glob(".*.tmp"):
            seen.setdefault(path.name, time.monotonic())
        return len(seen) >= saves and time.monotonic() - max(seen.values()) > delay

    return is_time


def chain(folder: Path, number: int, kills: int, steps: int, whole: float, seed: int) -> Iterator[None]:
    """One run, killed so many times and then left alone; hands over where it has to wait."""
    rng, workdir, killed, complete = random.Random(seed), folder / f"killed-{number}", 0, 0
    while True:
        pid, is_time = start(folder, workdir, steps), moments(rng, whole, workdir)
        while not (over := is_over(pid)) and not (killed < kills and is_time()):
            yield
        if over and killed == kills:
            return
        if over:
            workdir.rename(folder / f"complete-{number}-{complete}")
            complete += 1
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        names = [path.name for path in (workdir / "checkpoints").glob("*")]
        step = max((int(name) for name in names if name.isdecimal()), default=0)
        half = " while it wrote a checkpoint" if any(name.startswith(".") for name in names) else ""
        print(f"seed {seed}, kill {killed}: run {complete + 1}, after step {step} of {steps}{half}", flush=True)


def main(folder: Path, chains: int, kills: int, steps: int, seed: int) -> None:
    """Makes all runs."""
    began = time.monotonic()
    pid = start(folder, folder / "whole", steps)
    while not is_over(pid):
        time.sleep(0.001)
    whole = time.monotonic() - began
    print(f"not killed: {whole:.1f} s", flush=True)
    running = [chain(folder, number, kills, steps, whole, seed + number) for number in range(chains)]
    while running:
        running = [one for one in running if next(one, "over") is None]
        time.sleep(0.001)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
