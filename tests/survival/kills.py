"""A program that kills runs of the tiny job again and again, and resumes them.

    python -m tests.survival.kills FOLDER CHAINS KILLS STEPS SEED

`FOLDER/whole` gets a run that is never killed. For each of the CHAINS chains, `FOLDER/killed-<chain>` gets a run that
is killed and resumed KILLS times, and then completes. All chains run at the same time. If a run completes before it is
killed, it is kept as `FOLDER/complete-<chain>-<number>`, and the chain goes on with a new run. All runs have STEPS
steps.

Half of the kills come at a random time. The others come soon after the run has begun to write a checkpoint. The program
prints a line for each kill. Importing JAX takes longer than a run. So this process imports all modules once and forks
for every start of `launch.py`. It uses no devices itself, because JAX cannot be forked after it has started threads.
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
from tests.training import tiny, tiny_job  # noqa: F401 - tiny_job imports all modules of the job before the fork.


def start(folder: Path, workdir: Path, steps: int) -> int:
    """Start or resume a run of the tiny job in a forked process, and return the process id.

    The run saves a checkpoint at every step.

    Args:
        folder: The folder with the files of the tiny job. The output of the run is appended to a file in it.
        workdir: The folder of the run.
        steps: The number of steps of the run.
    """
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
    """Return whether a child process has ended. If it failed, exit this program."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status:
        sys.exit(f"a run ended with the status {status} by itself")
    return bool(done)


def moments(rng: random.Random, whole: float, workdir: Path) -> Callable[[], bool]:
    """Choose a random moment to kill a run, and return a function that says whether it has come.

    Args:
        rng: The generator of random numbers.
        whole: The duration in seconds of a run that is not killed.
        workdir: The folder of the run.
    """
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
    """Kill and resume a run `kills` times, and then let it complete.

    This is a generator, which yields whenever it has to wait, so that several chains can take turns.

    Args:
        folder: The folder with the files of the tiny job, in which the folder of the run is made.
        number: The number of this chain.
        kills: The number of kills.
        steps: The number of steps of the run.
        whole: The duration in seconds of a run that is not killed.
        seed: The seed for the moments of the kills.
    """
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
    """Make the run that is not killed, and then all chains. The arguments are those of the command line."""
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
