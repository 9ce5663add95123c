import errno
import json
import os
import struct

import jax.numpy as jnp
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from surm_jax.errors import UserError
from surm_jax.record.metrics import JSONL_NAME, MetricWriter, StepLog, read_metrics


def lines_of(folder):
    return [json.loads(line) for line in (folder / JSONL_NAME).read_text().splitlines()]


def write(folder, steps, start=0):
    with MetricWriter(folder, start) as writer:
        for step in steps:
            writer.write(step, {"train_loss": step / 4})


def test_metrics_are_lines_of_json_at_once(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, {"train_loss": 0.1, "learning_rate": 1e-3})
        writer.write(2, {"test_accuracy": 0.5})
        # The lines are in the file before the writer is closed. So a user can watch them, and a killed run keeps them.
        expected = [{"step": 1, "train_loss": 0.1, "learning_rate": 1e-3}, {"step": 2, "test_accuracy": 0.5}]
        assert lines_of(tmp_path) == expected
    assert list(read_metrics(tmp_path)) == expected


def events_of(path):
    """Return the scalars in a TensorBoard file, as tuples (step, name, value).

    A record of the file is the length of an event (8 bytes), a checksum (4 bytes), the event, and a checksum (4 bytes).
    """
    found, data = [], path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[12 + size + 4 :]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_them_too(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, {"train_loss": 0.25, "gradient_norm": 3.0})
        writer.write(2, {"train_loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events_of(events) == [(1, "train_loss", 0.25), (1, "gradient_norm", 3.0), (2, "train_loss", 0.5)]


def test_a_full_disk_below_tensorboard_is_an_error_at_once(tmp_path, monkeypatch):
    def full(self, event):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricWriter(tmp_path, 0) as writer:
        monkeypatch.setattr(EventsWriter, "write_event", full)
        with pytest.raises(UserError, match=f"cannot write {tmp_path / 'tensorboard'}: No space left on device"):
            writer.write(1, {"train_loss": 0.5})
    assert lines_of(tmp_path) == [{"step": 1, "train_loss": 0.5}]


def test_going_on_drops_what_comes_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 5], start=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 5]
    write(tmp_path, [6], start=5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 5, 6]
    write(tmp_path, [1], start=0)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_lines_that_are_kept_are_kept_to_the_last_digit(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, {"train_loss": 0.1 + 0.2, "gradient_norm": 1e-17})
    before = (tmp_path / JSONL_NAME).read_bytes()
    write(tmp_path, [], start=1)
    assert (tmp_path / JSONL_NAME).read_bytes() == before


@pytest.mark.parametrize("rest", ['{"step": 3, "train_lo', "{", "nonsense", "[3]", '{"stp": 3}'])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, rest):
    write(tmp_path, [1, 2])
    with (tmp_path / JSONL_NAME).open("a") as file:
        file.write(rest)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [3], start=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / JSONL_NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is damaged"):
        MetricWriter(tmp_path, 3)
    assert path.read_bytes() == before


class Recorder:
    """Records all calls of a `StepLog`. It replaces the writer, the progress and the stopwatch."""

    def __init__(self):
        self.written, self.shown, self.advanced, self.counted = [], [], 0, 0

    def write(self, step, metrics):
        self.written.append((step, dict(metrics)))

    def show(self, step, metrics):
        self.shown.append(step)

    def advance(self):
        self.advanced += 1

    def count_or_start(self):
        self.counted += 1


def metrics_at(step, **changed):
    values = {"train_loss": step / 2, "train_accuracy": 0.5, "gradient_norm": 2.0, **changed}
    return {name: jnp.float32(value) for name, value in sorted(values.items())}


def step_log(recorder, every, last):
    return StepLog(recorder, recorder, recorder, every, last, lambda step: {"learning_rate": step / 10})


def test_it_works_one_step_behind():
    recorder = Recorder()
    log = step_log(recorder, every=1, last=3)
    log.note(1, metrics_at(1))
    assert recorder.written == [] and recorder.advanced == 0
    log.note(2, metrics_at(2))
    assert [step for step, _ in recorder.written] == [1]
    log.flush()
    log.flush()
    assert [step for step, _ in recorder.written] == recorder.shown == [1, 2]
    assert recorder.advanced == recorder.counted == 2
    expected = {"train_loss": 1.0, "train_accuracy": 0.5, "gradient_norm": 2.0, "learning_rate": 0.2}
    assert list(recorder.written[1][1].items()) == list(expected.items())


@pytest.mark.parametrize(
    ("every", "written"), [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (9, [7])]
)
def test_which_steps_are_written(every, written):
    recorder = Recorder()
    log = step_log(recorder, every, last=7)
    for step in range(1, 8):
        log.note(step, metrics_at(step))
    log.flush()
    assert [step for step, _ in recorder.written] == written
    assert recorder.advanced == 7


@pytest.mark.parametrize("name", ["train_loss", "train_accuracy", "gradient_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_stops_with_its_step(name, value):
    recorder = Recorder()
    log = step_log(recorder, every=0, last=9)
    log.note(1, metrics_at(1))
    # With `every=0`, the metrics of this step are not written. They are checked anyway.
    log.note(2, metrics_at(2, **{name: value}))
    with pytest.raises(UserError, match=f"{name} is {value} at step 2"):
        log.note(3, metrics_at(3))
    assert recorder.written == []
