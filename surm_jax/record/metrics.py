"""The log of a run's metrics: the file `metrics.jsonl`, with one JSON object per line, and files for TensorBoard."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from surm_jax.atomic import replacing
from surm_jax.devices.processes import is_first
from surm_jax.errors import UserError
from surm_jax.record.progress import Progress, Stopwatch

JSONL_NAME = "metrics.jsonl"
# The metrics of a training step, in the order in which they are shown. A task without classes has no accuracy.
STEP_METRICS = ("train_loss", "train_accuracy", "gradient_norm")


class NotFiniteError(UserError):
    """A loss or another metric is NaN or infinite, because the run has diverged."""


class MetricWriter:
    """A context manager that writes metrics to `<folder>/metrics.jsonl` and `<folder>/tensorboard/`.

    The files are written by the thread that calls the methods. So if the disk is full, it is this thread that gets the
    error. If a run has several processes, only the first one writes. The others only check that the metrics are finite.

    Args:
        folder: The folder of the run.
        step: The step from which the run resumes, or 0. Metrics of later steps that an earlier start wrote are removed,
            because these steps are repeated.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        self._path = path = folder / JSONL_NAME
        self._folder = folder / "tensorboard"
        self._jsonl: TextIO | None = None
        self._events: Any = None
        if not is_first():
            return
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if path.exists() else []
        try:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._jsonl = path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        self._first_step = step + 1
        with self._writing_events():
            self._folder.mkdir(exist_ok=True)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._jsonl is None:
            return
        # Every line was flushed when it was written. So nothing is lost if closing the file fails.
        with contextlib.suppress(OSError):
            self._jsonl.close()
        try:
            with self._writing_events():
                if self._events is not None:
                    self._events.close()
        except UserError:
            if kind is None:
                raise

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step.

        Raises:
            NotFiniteError: A metric is not finite.
            UserError: The metrics cannot be written.
        """
        require_finite(step, metrics)
        if self._jsonl is None:
            return
        try:
            self._jsonl.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
            self._jsonl.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None
        with self._writing_events():
            if self._events is None:
                # A slow import, which would delay the first step of a run.
                from surm_jax.record.events import Events

                self._events = Events(self._folder, self._first_step)
            self._events.write(step, metrics)

    def sync(self) -> None:
        """Force all written metrics to disk.

        Call it before a checkpoint is saved, so that there is never a checkpoint whose metrics are missing.

        Raises:
            UserError: The metrics cannot be written.
        """
        if self._jsonl is None:
            return
        try:
            os.fsync(self._jsonl.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None
        with self._writing_events():
            if self._events is not None:
                self._events.flush()

    @contextlib.contextmanager
    def _writing_events(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._folder}: {error.strerror}") from None


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of a run's `metrics.jsonl`.

    If the last line is damaged, it is skipped, because the run may have been killed while it wrote this line.

    Raises:
        UserError: A line before the last one is not a JSON object with a number `step`.
    """
    path = folder / JSONL_NAME
    lines = path.read_text().splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}, is damaged: {text[:80]!r}") from None
        yield line


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raise an error if a metric of this step is NaN or infinite, in order to stop a run that has diverged.

    Raises:
        NotFiniteError: A metric is not finite. The message names it and the step.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value} at step {step}: look at the data, or lower the learning rate")


class StepLog:
    """A log of the metrics of training steps, which never lets the device wait for the host.

    While the device computes a step, the host handles the metrics of the previous one. It checks that they are finite.
    At every `every`-th step and at the last step, it also writes and shows them.

    Args:
        writer: Writes the metrics.
        progress: Shows the metrics.
        watch: Counts the steps and measures their time. It is started after the first step, because the time of that
            step may include compilation.
        every: The interval, in steps, at which metrics are written and shown. 0 means only at the last step.
        last: The last step of the run.
        rates: A function that takes a step and returns further values to write, such as the learning rates.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        watch: Stopwatch,
        every: int,
        last: int,
        rates: Callable[[int], dict[str, float]],
    ):
        self._writer, self._progress, self._watch, self._rates = writer, progress, watch, rates
        self._every, self._last = every, last
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def note(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Keep the metrics of a step that the device may still compute, and handle those of the previous step."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Wait for the metrics that were passed to `note` last, and check that they are finite.

        If `every` or `last` selects their step, this also writes and shows them.

        Raises:
            NotFiniteError: A metric is not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        # `jax.jit` sorts the keys of the dictionary that it returns. Restore the order in which metrics are shown.
        values = {name: float(metrics[name]) for name in STEP_METRICS if name in metrics}
        self._watch.count_or_start()
        require_finite(step, values)
        if step == self._last or (self._every and step % self._every == 0):
            rates = self._rates(step)
            self._writer.write(step, {**values, **rates})
            shown = {name: rates[name] for name in ("examples_per_second",) if name in rates}
            self._progress.show(step, {**values, **shown})
        self._progress.advance()
