"""What a run measures: `metrics.jsonl`, one JSON object a line, and TensorBoard beside it."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from surm_jax.devices.processes import is_first
from surm_jax.errors import UserError
from surm_jax.files import replacing
from surm_jax.record.progress import Progress, Stopwatch

JSONL_NAME = "metrics.jsonl"
# In the order in which they are shown; there is no accuracy where labels are numbers.
STEP_METRICS = ("train_loss", "train_accuracy", "gradient_norm")


class NotFiniteError(UserError):
    """A run has gone astray: a loss or another measure is NaN or infinite."""


class MetricWriter:
    """Appends metrics to `<folder>/metrics.jsonl` and `<folder>/tensorboard/`. Use as a context manager.

    Of several processes the first alone writes; the others look at the numbers.

    Args:
        folder: the run's folder.
        step: the step from which the run goes on; what was written of later steps is dropped, since it comes again.

    Raises:
        UserError: if the file cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        self._path = path = folder / JSONL_NAME
        self._jsonl = self._tensorboard = None
        if not is_first():
            return
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if path.exists() else []
        try:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._jsonl = path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        self._tensorboard = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._jsonl is None:
            return
        # Every line was flushed; one that could not be has been told.
        with contextlib.suppress(OSError):
            self._jsonl.close()
        try:
            self._tensorboard.close()
        except OSError as error:
            if kind is None:
                raise UserError(f"cannot write {self._tensorboard.logdir}: {error.strerror}") from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes numbers under their names for one step.

        Raises:
            NotFiniteError: if one of them is not finite.
            UserError: if they cannot be written.
        """
        require_finite(step, metrics)
        if self._jsonl is None:
            return
        try:
            self._jsonl.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
            self._jsonl.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Waits until what was written is on the disk: a checkpoint must not outlive the lines before it."""
        if self._jsonl is not None:
            os.fsync(self._jsonl.fileno())


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a run's `metrics.jsonl`. A last line that was cut off is left out.

    Raises:
        UserError: if another line is not a JSON object with a step.
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
    """Stops a run that has gone astray.

    Raises:
        NotFiniteError: naming the step and the metric that is not finite.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{name} is {value} at step {step}: look at the data, or lower the learning rate")


class StepLog:
    """Writes the metrics of training steps, one step behind the device, so that it never waits for them.

    Every step's metrics are looked at; those of every `every`-th step and of the last one are written.

    Args:
        writer: where metrics go.
        progress: where they are shown.
        watch: started after the first step, whose time is compilation, and counted up with every later one.
        every: how many steps lie between two that are written; 0: only the last one is.
        last: the last step.
        rates: gives what else belongs to a step, such as its learning rate.
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
        """Takes the metrics of a step that may still be running, and works on those of the step before."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the metrics that were noted last, and writes them if they are due.

        Raises:
            NotFiniteError: if one of them is not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        # jit sorts the names of what it returns.
        values = {name: float(metrics[name]) for name in STEP_METRICS if name in metrics}
        self._watch.count_or_start()
        require_finite(step, values)
        if step == self._last or (self._every and step % self._every == 0):
            rates = self._rates(step)
            self._writer.write(step, {**values, **rates})
            shown = {name: rates[name] for name in ("examples_per_second",) if name in rates}
            self._progress.show(step, {**values, **shown})
        self._progress.advance()
