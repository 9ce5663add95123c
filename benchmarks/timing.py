"""Timing programs against each other: warm, in turn, by medians, so that what else runs beside them hits all alike."""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm import tqdm


def medians(programs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Runs all programs in turn, `rounds` times, each round in another order.

    Of two calls of a program in a row the second is timed: it finds caches and the allocator as the program itself
    leaves them, which is how a training loop finds them, and not as another program does.

    Args:
        programs: functions without arguments by name. What they return is waited for.
        rounds: how often each is timed.

    Returns:
        The median time of each, in seconds.
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
    """What every row says of where it was measured."""
    return {"device": device(), "jax": jax.__version__}


def device() -> str:
    """What the programs run on, in words."""
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
    """A text table: `columns` maps keys of the rows to format specifications."""
    cells = [list(columns)] + [
        [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.items()] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
