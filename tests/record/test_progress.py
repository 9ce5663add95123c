import io
import os
import signal
import sys

import pytest

from surm_jax.record import progress
from surm_jax.record.progress import Interruption, Progress, Stopwatch, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replaces the module `time` by a clock that shows the attribute `now`, which the test sets."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_have_step_metrics_and_the_time_left(clock, capsys):
    with Progress("lora", 100, 20) as shown:
        clock.now += 30.0
        for _ in range(10):
            shown.advance()
        shown.show(30, {"train_loss": 0.123456, "learning_rate": 1e-5})
    # The ten steps of this start took 30 seconds, so that the remaining 70 steps take 210 seconds.
    captured = capsys.readouterr()
    assert captured.err == "lora: step 30/100  train_loss 0.1235  learning_rate 1e-05  ETA 0:03:30\n"
    assert captured.out == ""


def test_an_evaluation_before_the_first_step_has_an_eta(clock, capsys):
    with Progress("lora", 100, 20) as shown:
        shown.show(20, {"test_loss": 1.0})
    assert "step 20/100" in capsys.readouterr().err


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("lora", 4, 1) as shown:
        shown.advance()
        shown.show(2, {"train_loss": 0.25})
        shown.say("going on")
        shown.advance()
    text = terminal.getvalue()
    assert "lora" in text and "/4" in text and "train_loss=0.25" in text and "step/s" in text
    assert "going on\n" in text
    assert "ETA" not in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_track_yields_everything(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(track(range(5), "evaluate")) == list(range(5))
    assert ("evaluate" in sys.stderr.getvalue()) == sys.stderr.isatty()


def test_the_stopwatch_leaves_out_the_first_step_and_the_pauses(clock):
    watch = Stopwatch()
    assert watch.rate() is None
    clock.now += 50  # The time of the first step, which includes compilation.
    watch.count_or_start()
    assert watch.rate() is None
    for _ in range(4):
        clock.now += 0.5
        watch.count_or_start()
    assert watch.rate() == pytest.approx(2.0)
    watch.stop()
    clock.now += 1000  # The time of an evaluation.
    assert watch.rate() == pytest.approx(2.0)
    watch.start()
    clock.now += 2.0
    watch.count_or_start()
    watch.stop()
    watch.stop()
    assert (watch.steps, watch.seconds) == (5, pytest.approx(4.0))
    assert watch.rate() == pytest.approx(5 / 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number, capsys):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with Interruption() as interruption:
            assert interruption.signal is None
            os.kill(os.getpid(), number)
            assert interruption.signal is number and acted == []
            os.kill(os.getpid(), number)
            assert acted == [number]
        assert f"{number.name}: stopping after this step" in capsys.readouterr().err
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
