"""The display of a run's progress, and the handling of the signals that stop a run.

Progress is written to the standard error. If this is a terminal, it shows a bar with the time left. If it is a log file
or a pipe, progress is written as plain lines. If a run has several processes, only the first one shows anything.
"""

import contextlib
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
    """A context manager that shows the progress of a loop with a known number of steps.

    A run goes on if its progress cannot be displayed, because the terminal or the reader of a pipe is gone.

    Args:
        what: The name that is shown with the bar or at the beginning of each line.
        total: The number of steps of the whole run.
        start: The number of steps that earlier starts of the run have made.
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
        """Count one step, and move the bar."""
        with contextlib.suppress(OSError):
            self._bar.update()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step next to the bar. Without a terminal, print them in a line with the time left."""
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
            return
        done = step - self._start
        left = (time.monotonic() - self._began) / max(done, 1) * (self._total - step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self._what}: step {step}/{self._total}  {values}  ETA {datetime.timedelta(seconds=round(left))}")

    def say(self, line: str) -> None:
        """Print a line on the standard error, above the bar if there is one."""
        if is_first():
            with contextlib.suppress(OSError):
                self._bar.write(line, file=sys.stderr)
                sys.stderr.flush()


def track(batches: Iterable, what: str) -> Iterable:
    """Return an iterable over the same batches that shows a progress bar in a terminal. The bar vanishes at the end."""
    return tqdm.tqdm(batches, desc=what, leave=False, disable=not _has_terminal(), dynamic_ncols=True)


def _has_terminal() -> bool:
    return sys.stderr.isatty() and is_first()


class Stopwatch:
    """A stopwatch that measures the number of training steps per second.

    It is stopped during evaluations and checkpoints, so that their time does not count.

    Attributes:
        steps: The number of steps counted so far.
        seconds: The time in seconds for which the watch ran until it was last stopped.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Start the watch, or continue after a stop."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop the watch. If it does not run, this does nothing."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def count_or_start(self) -> None:
        """Count a step that has ended.

        If the watch does not run, start it and do not count the step, because its time may include compilation.
        """
        if self._since is None:
            self.start()
        else:
            self.steps += 1

    def rate(self) -> float | None:
        """Return the number of steps per second so far, or None before the first counted step."""
        running = time.monotonic() - self._since if self._since is not None else 0.0
        return self.steps / (self.seconds + running) if self.steps else None


class Interruption:
    """A context manager that catches the signals SIGINT and SIGTERM, so that a run can end its current step and save.

    The first signal is only stored. A second signal ends the program at once, because the first one restores the
    earlier handlers.

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
        # Restore the handlers first. A second signal may come while the message is printed.
        for other, handler in self._before.items():
            signal.signal(other, handler)
        with contextlib.suppress(OSError):
            print(
                f"\n{self.signal.name}: stopping after this step (a second signal stops at once)",
                file=sys.stderr,
                flush=True,
            )
