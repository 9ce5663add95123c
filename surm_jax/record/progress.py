"""The progress that a run shows, and the signals that stop it.

A terminal shows a bar with the time left, a log file plain lines. Only the first process shows anything.
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
    """The progress of a loop of known length. Use it as a context manager.

    Args:
        what: The name to show.
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
        """Show the metrics of a step next to the bar, or without a terminal as a line with the time left."""
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
    """Return the batches, whose iteration shows a bar in a terminal. The bar vanishes at the end."""
    return tqdm.tqdm(batches, desc=what, leave=False, disable=not _has_terminal(), dynamic_ncols=True)


def _has_terminal() -> bool:
    return sys.stderr.isatty() and is_first()


class Stopwatch:
    """A measure of steps per second, which leaves out evaluations and checkpoints.

    Attributes:
        steps: Number of steps counted.
        seconds: Time between starts and stops.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start the watch."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop the watch if it runs."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def count_or_start(self) -> None:
        """Count a step if the watch runs. Otherwise start it without counting this step, which may have compiled."""
        if self._since is None:
            self.start()
        else:
            self.steps += 1

    def rate(self) -> float | None:
        """Return the number of steps per second so far, or None before the first counted step."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        return self.steps / (self.seconds + running) if self.steps else None


class Interruption:
    """A request to stop after the current step, made by the first SIGINT or SIGTERM. A second signal acts at once.

    Use it as a context manager around the loop.

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
        print(
            f"\n{self.signal.name}: stopping after this step (a second signal stops at once)",
            file=sys.stderr,
            flush=True,
        )
        for other, handler in self._before.items():
            signal.signal(other, handler)
