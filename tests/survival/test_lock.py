"""Check that a second run in the folder of a run is refused, and that a killed run does not leave its folder locked."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from surm_jax.errors import UserError
from surm_jax.record import curves, workdir
from surm_jax.record.workdir import LOCK_NAME, locked
from surm_jax.training import loop
from surm_jax.training.modes import train_run
from tests.training import tiny

# A program that locks a folder, prints that it has the lock, and sleeps.
HOLD = """
import sys, time
from pathlib import Path
from surm_jax.record.workdir import locked
with locked(Path(sys.argv[1])):
    print("taken", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_of_the_first_and_a_killed_one_leaves_nothing(holder, tmp_path, tiny_files):
    message = f"{tmp_path} is in use by the process {holder.pid} on {platform.node()}: .* choose another folder"
    with pytest.raises(UserError, match=message), locked(tmp_path):
        pass
    # A training run in the same folder ends with the same message, and writes no files.
    with pytest.raises(UserError, match=message):
        train_run(tiny.make_config(tiny_files), tmp_path)
    assert os.listdir(tmp_path) == [LOCK_NAME]
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert os.listdir(tmp_path) == [LOCK_NAME]
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.exhaustive
def test_a_run_holds_its_folder_from_beginning_to_end(tiny_files, tmp_path, monkeypatch):
    config = tiny.make_config(tiny_files, "linear_probe", **{"optim.steps": 1, "seeds": (0, 1)})
    seen = []

    def watched(function):
        def watch(*arguments):
            for path in tmp_path.rglob(LOCK_NAME):
                with pytest.raises(UserError, match=f"{path.parent} is in use by the process {os.getpid()} "):
                    locked(path.parent).__enter__()
                seen.append(path.parent.name)
            return function(*arguments)

        return watch

    for owner, name in ((loop, "prepare"), (loop, "put_batch"), (curves, "draw_curves")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    train_run(config, tmp_path)
    # The locks were checked at three moments of each of the two seeds. Each time, the folder of the whole run and the
    # folder of the present seed were locked.
    assert sorted(seen) == sorted([tmp_path.name] * 6 + ["seed-0"] * 3 + ["seed-1"] * 3)
    assert not list(tmp_path.rglob(LOCK_NAME))


def test_one_of_many_gets_it_while_others_let_it_go(tmp_path):
    inside, most, refused = 0, 0, 0

    def work():
        nonlocal inside, most, refused
        taken = 0
        while taken < 50:
            try:
                with locked(tmp_path):
                    inside += 1
                    most, taken = max(most, inside), taken + 1
                    time.sleep(1e-4)
                    inside -= 1
            except UserError as error:
                assert "is in use by" in str(error)
                refused += 1

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert most == 1 and refused
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked \(Operation not supported\)"), locked(tmp_path):
        pass
