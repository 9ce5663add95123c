"""Damages what strangers write and reads it: the result is an error that says so, what was written, or other numbers.

An example is repeated by the seed and its number. Each has 10 seconds, and a gigabyte more than the process had.
"""

import collections
import contextlib
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from surm_jax.errors import UserError
from tests.fuzz.damage import copy_damaged
from tests.fuzz.subjects import SUBJECTS, Content

SECONDS, BYTES = 10, 2**30
LONGEST_MESSAGE = 5000


class TimeIsUp(BaseException):
    """The error that ends a reading that takes too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limits the time and the memory of what is done inside."""

    def stop(*_) -> None:
        raise TimeIsUp

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(folder: Path, numbers: range, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Reads damaged examples.

    Args:
        folder: for files.
        numbers: of the examples.
        seed: of all of them.

    Returns:
        How often which result came of which subject, and a text for each that must not be.
    """
    whole, names = {}, list(SUBJECTS)
    for name, subject in SUBJECTS.items():
        (folder / name).mkdir()
        subject.write(folder / name)
        whole[name] = subject.read(folder / name)
    counts, problems = collections.Counter(), []
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        (folder / "example").write_text(f"{number} {name}")  # for whoever looks after a crash
        copy_damaged(rng, folder / name, folder / "damaged" / name)
        result, problem = _read(name, folder / "damaged" / name, whole[name])
        counts[f"{name}: {result}"] += 1
        if problem:
            problems.append(f"example {number} of seed {seed} ({name}): {problem}")
        shutil.rmtree(folder / "damaged")
    return counts, problems


def _read(name: str, folder: Path, whole: Content) -> tuple[str, str]:
    """Return the outcome of an example as a word, and a message if this outcome is a failure."""
    start = time.perf_counter()
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = SUBJECTS[name].read(folder)
    except UserError as error:
        return "refused", _problem_of(error)
    except TimeIsUp:
        return "problem", f"{time.perf_counter() - start:.1f} s\n{traceback.format_exc()[-2000:]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "problem", traceback.format_exc()[-2000:]
    if not all(np.isfinite(array.astype(np.float64)).all() for array in content.values()):
        return "problem", "numbers that are not finite"
    if content.keys() == whole.keys() and all(np.array_equal(content[key], whole[key]) for key in whole):
        return "the same", ""
    return "other numbers", ""


def _problem_of(error: UserError) -> str:
    """Says what is wrong with an error, if anything is."""
    message, cause = str(error), error
    while cause := cause.__cause__ or cause.__context__:
        if isinstance(cause, MemoryError):
            return f"memory was asked for before its size was known: {message}"
    if not message or len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters"
    return ""
