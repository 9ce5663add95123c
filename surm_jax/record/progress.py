"""What a person sees of a run while it works, and how a signal stops it.

A terminal shows a bar with the time left; a log file gets plain lines. Only the first of several processes shows
anything.
"""

import datetime
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import tqdm

from surm_jax.devices.processes import is_first


class Progress:
    """Progress of a loop of known length. Use as a context manager.

    Args:
        what: Its name.
        total: Number of steps of the whole run.
        start: Number of steps already made.
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
        """Count one step."""
        self._bar.update()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step: beside the bar, or as a line with the time left."""
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
            return
        done = step - self._start
        left = (time.monotonic() - self._began) / max(done, 1) * (self._total - step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self._what}: step {step}/{self._total}  {values}  ETA {datetime.timedelta(seconds=round(left))}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if is_first():
            self._bar.write(line, file=sys.stderr)
            sys.stderr.flush()


def track(batches: Iterable, what: str) -> Iterable:
    """Yield the batches; a terminal shows a bar, which vanishes at the end."""
    return tqdm.tqdm(batches, desc=what, leave=False, disable=not _has_terminal(), dynamic_ncols=True)


def _has_terminal() -> bool:
    return sys.stderr.isatty() and is_first()


class Stopwatch:
    """Measures the rate of steps, without evaluations and checkpoints between them.

    Attributes:
        steps: Number of steps counted while it ran.
        seconds: How long it ran.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start it."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def count_or_start(self) -> None:
        """Count a step if it runs. Otherwise do not count this step, and start: its time included compilation."""
        if self._since is None:
            self.start()
        else:
            self.steps += 1

    def rate(self) -> float | None:
        """Return steps per second so far, or None before the first counted step."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        return self.steps / (self.seconds + running) if self.steps else None


class Interruption:
    """A request to stop after the current step: the first SIGINT or SIGTERM. A second signal acts at once.

    Use as a context manager around the loop.

    Attributes:
        signal: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

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
