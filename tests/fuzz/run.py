"""Damage files that users may get from others, read them, and report what should not happen.

Reading a damaged file may raise a `UserError`, or return the original arrays or other finite arrays. Everything else is
a problem: any other exception, numbers that are not finite, more than 10 seconds, or more than one gibibyte of
additional memory. The seed and the number of an example determine its damage.
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
    """The exception that stops reading an example if it takes too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limit the time and the memory of the code in the `with` block."""

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
    """Make and read damaged examples.

    Args:
        folder: An empty folder for files.
        numbers: The numbers of the examples. The number of an example determines its subject and, with the seed, its
            damage.
        seed: The seed of all examples.

    Returns:
        A counter of the examples for each subject and outcome, and a list with a message for each problem.
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
        (folder / "example").write_text(f"{number} {name}")  # If the process crashes, this shows which example it was.
        copy_damaged(rng, folder / name, folder / "damaged" / name)
        result, problem = _read(name, folder / "damaged" / name, whole[name])
        counts[f"{name}: {result}"] += 1
        if problem:
            problems.append(f"example {number} of seed {seed} ({name}): {problem}")
        shutil.rmtree(folder / "damaged")
    return counts, problems


def _read(name: str, folder: Path, whole: Content) -> tuple[str, str]:
    """Read a damaged example. Return the outcome in one or two words, and a message if it is a problem.

    Args:
        name: The name of the subject.
        folder: The folder with the damaged files.
        whole: The arrays that the undamaged files hold.
    """
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
    """Return what is wrong with a `UserError`, or an empty string.

    Its message may not be empty or very long, and its cause may not be a `MemoryError`.
    """
    message, cause = str(error), error
    while cause := cause.__cause__ or cause.__context__:
        if isinstance(cause, MemoryError):
            return f"memory was asked for before its size was known: {message}"
    if not message or len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters"
    return ""
