"""What all benchmarks share: their command line, fair timing, and tables.

Programs are warmed up and timed in turn, and their medians are compared, so that a disturbance hits all of them alike.
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
    """Read the flags and run a benchmark; a mistake ends it with one line before anything is timed."""

    def checked(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise UserError(f"unknown argument {arguments[1]!r}: flags begin with --")
        if OUT.value is not None and (Path(OUT.value).is_dir() or not Path(OUT.value).parent.is_dir()):
            raise UserError(f"--out={OUT.value} must name a file in an existing folder")
        main()

    # Without this `--help` lists only the flags that the benchmark's own module defines.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["out"])
    app.run(lambda arguments: command(lambda: checked(arguments)))


def write(rows: list[dict[str, Any]]) -> None:
    """Write the rows to the file of `--out`, if there is one."""
    if OUT.value is not None:
        Path(OUT.value).write_text(json.dumps(rows, indent=1) + "\n")


def numbers(flag: flags.FlagHolder[list[str]]) -> list[int]:
    """Return the numbers that a flag lists.

    Raises:
        UserError: The list is empty, or holds something other than positive whole numbers.
    """
    if not flag.value or not all(re.fullmatch(r"[1-9]\d*", text) for text in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)} must list whole numbers above 0, such as 1,2,4")
    return [int(text) for text in flag.value]


def medians(programs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Return the median time of each program, in seconds.

    In each round every program is called twice in a row, and the second call is timed: then the program itself has left
    caches and allocator in their state, as in a training loop. The order of programs changes from round to round.

    Args:
        programs: Functions without arguments, by name. A call ends when its result is ready.
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
    """Return the part of a row that says where it was measured."""
    return {"device": device(), "jax": jax.__version__}


def device() -> str:
    """Return the name of the device that programs run on."""
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
    """Return a text table. `columns` maps keys of the rows to format specifications."""
    cells = [list(columns)] + [
        [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.items()] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
