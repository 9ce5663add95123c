"""Check that the program ends with one message and no traceback if it cannot write."""

import os
import subprocess
import sys

import pytest

from surm_jax import __main__ as launch
from tests.survival.test_disk_full import MOUNT, ROOT, can_mount


def start(tmp_path, tiny_files, *arguments, before=(), stdout=subprocess.DEVNULL):
    config = f"--config=tests/training/tiny_job.py:{tiny_files}"
    command = [*before, sys.executable, "launch.py", config, f"--workdir={tmp_path}/run", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SURM_JAX_CACHE": str(tiny_files / "cache")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


def said(run):
    """Return the lines that a process prints to the standard error, except those about steps and compilation."""
    lines = run.communicate()[1].splitlines()
    return [line for line in lines if " ETA " not in line and not line.startswith("compiled for")]


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_an_output_that_cannot_be_written(tmp_path, tiny_files, kind):
    if kind == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    run = start(tmp_path, tiny_files, "--mode=describe", stdout=stdout)
    (message,) = said(run)
    assert message.startswith("error: ")
    assert ("No space left" if kind == "full" else "broken pipe") in message
    assert run.returncode == (1 if kind == "full" else 141)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", ["20k", "60k", "100k", "300k"])
def test_a_full_disk_while_a_run_trains(tmp_path, tiny_files, size):
    if not can_mount():
        pytest.skip("needs a user namespace to mount a small file system in (unshare -rm)")
    before = ["unshare", "-rm", "sh", "-c", MOUNT.replace("1m", size), str(tmp_path)]
    values = {"optim.steps": 400, "log.metrics_every": 1, "log.checkpoint_every": 5}
    run = start(tmp_path, tiny_files, *(f"--config.{key}={value}" for key, value in values.items()), before=before)
    (message,) = said(run)
    assert message.startswith("error: cannot write") and "No space left on device" in message
    assert run.returncode == 1


def test_echoes_in_threads_are_silent_and_bugs_are_not(capsys, monkeypatch):
    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(launch.threading, "excepthook", launch.threading.excepthook)
    launch._silence_echoes()

    def fail_with(error):
        def fail():
            raise error

        thread = launch.threading.Thread(target=fail)
        thread.start()
        thread.join()
        return capsys.readouterr().err

    assert fail_with(OSError(28, "No space left on device")) == fail_with(RuntimeError("Event loop is closed")) == ""
    assert "KeyError: 'a bug'" in fail_with(KeyError("a bug"))
