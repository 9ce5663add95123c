"""Long work shows itself: a bar with the time left on a terminal, plain lines elsewhere.

Of several processes the first alone shows anything.
"""

import datetime
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from types import FrameType

import tqdm

from surm_jax.devices.processes import is_first


class Progress:
    """Progress of a loop of known length. Use as a context manager.

    Args:
        what: its name.
        total: the steps of the whole run.
        start: the steps already made.
    """

    def __init__(self, what: str, total: int, start: int):
        self._what, self._total, self._start, self._began = what, total, start, time.monotonic()
        self._bar = tqdm.tqdm(
            desc=what, total=total, initial=start, unit="step", disable=not _has_terminal(), dynamic_ncols=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Counts one step."""
        self._bar.update()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows metrics of a step: beside the bar, or as a line with the time left."""
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
            return
        done = step - self._start
        left = (time.monotonic() - self._began) / max(done, 1) * (self._total - step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self._what}: step {step}/{self._total}  {values}  ETA {datetime.timedelta(seconds=round(left))}")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if is_first():
            self._bar.write(line, file=sys.stderr)
            sys.stderr.flush()


def track(batches: Iterable, what: str) -> Iterable:
    """Yields the batches, with a bar on a terminal that vanishes at the end."""
    return tqdm.tqdm(batches, desc=what, leave=False, disable=not _has_terminal(), dynamic_ncols=True)


def _has_terminal() -> bool:
    return sys.stderr.isatty() and is_first()


class Stopwatch:
    """Measures the rate of steps, without what stands between them.

    Attributes:
        steps: steps counted while it ran.
        seconds: for how long it ran.
    """

    def __init__(self):
        self.steps, self.seconds, self._since = 0, 0.0, None

    def start(self) -> None:
        """Lets it run."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Halts it, if it runs."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def count_or_start(self) -> None:
        """Counts a step if it runs; otherwise that step is left out, and it runs from here on."""
        if self._since is None:
            self.start()
        else:
            self.steps += 1

    def rate(self) -> float | None:
        """Returns steps per second so far, or None before the first step."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        return self.steps / (self.seconds + running) if self.steps else None


class Interruption:
    """Turns the first SIGINT or SIGTERM into a request to stop after this step; a second one acts at once.

    Use as a context manager around the loop.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: stopping after this step (once more: at once)", file=sys.stderr, flush=True)
        for other, handler in self._before.items():
            signal.signal(other, handler)
