"""Metrics for TensorBoard. The import takes a second if PyTorch is installed, because tensorboardX imports it."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

# TensorBoard sees the metrics at the latest after so many seconds.
_FLUSH_SECONDS = 30


class Events:
    """A file of metrics in a folder for TensorBoard. Every method raises OSError if the file cannot be written.

    Args:
        folder: The folder, which exists.
        step: The first step of which metrics will be written. TensorBoard forgets what an earlier start of the run has
            written for this step and later ones, because they are repeated.
    """

    def __init__(self, folder: Path, step: int):
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._writer.write_event(
            Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        for name, value in metrics.items():
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()
