"""What all benchmarks share: the command line, the timing of programs, and tables of results.

Times are medians over several rounds. In each round every program is warmed up and timed once, so that a disturbance of
the machine affects all programs alike.
"""

import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from tqdm import tqdm

from experiments.command import command
from surm_jax.errors import UserError

OUT = flags.DEFINE_string("out", None, "Write the rows as JSON to this file.")


def benchmark(main: Callable[[], None]) -> None:
    """Parse the flags and run the main function of a benchmark.

    A wrong argument ends the process with an error message in one line, before anything is timed.
    """

    def checked(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise UserError(f"unknown argument {arguments[1]!r}: flags begin with --")
        if OUT.value is not None and (Path(OUT.value).is_dir() or not Path(OUT.value).parent.is_dir()):
            raise UserError(f"--out={OUT.value} must name a file in an existing folder")
        main()

    # Without this, `--help` would not list the flags of this module, but only those of the benchmark's own module.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["out"])
    app.run(lambda arguments: command(lambda: checked(arguments)))


def write(rows: list[dict[str, Any]]) -> None:
    """Write rows of results as JSON to the file of `--out`. Without `--out`, do nothing."""
    if OUT.value is not None:
        Path(OUT.value).write_text(json.dumps(rows, indent=1) + "\n")


def numbers(flag: flags.FlagHolder[list[str]]) -> list[int]:
    """Return the integers in the list of a flag such as `--devices=1,2,4`.

    Raises:
        UserError: The list is empty, or it holds something other than positive integers.
    """
    if not flag.value or not all(re.fullmatch(r"[1-9]\d*", text) for text in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must list whole numbers above 0, such as 1,2,4")
    return [int(text) for text in flag.value]


def medians(programs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Return the median time of each program, in seconds.

    In each round, in random order, every program is called twice in a row, and the second call is timed. So the caches
    and the memory allocator are as the program itself left them, as in a training loop.

    Args:
        programs: The programs by name, as functions without arguments. Arrays in a result need not be ready when the
            function returns. The time until they are ready is included.
        rounds: The number of rounds.
    """
    times: dict[Any, list[float]] = {name: [] for name in programs}
    shuffled = random.Random(0)
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name in shuffled.sample(list(programs), len(programs)):
            jax.block_until_ready(programs[name]())
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def setting() -> dict[str, str]:
    """Return on which device and with which version of JAX a row was measured, as entries of the row."""
    return {"device": device(), "jax": jax.__version__}


def device() -> str:
    """Return the name of the device that programs run on, with the number of devices or of CPU cores."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    return f"{_processor()}, {_cores()} cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: list[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return rows as a table of plain text.

    Args:
        rows: The rows, which map keys to values. If a key is missing or its value is None, the cell is empty.
        columns: The format specification of each column, by key.
    """
    cells = [list(columns)] + [
        [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.items()] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
