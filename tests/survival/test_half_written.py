"""Check that a process which is killed while it writes leaves the old or the new file, and never a part of one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from surm_jax import atomic
from surm_jax.atomic import is_temporary, remove_folder, remove_temporaries, replacing, replacing_folder

# A program that writes a file and a folder again and again, each time filled with one letter. It writes small blocks,
# so that a kill probably comes while a file is half written.
WRITER = """
import itertools, sys
from pathlib import Path
from surm_jax.atomic import replacing, replacing_folder
root = Path(sys.argv[1])
def fill(path, letter):
    with path.open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(letter * 4096)
for letter in itertools.cycle([b"a", b"b", b"c"]):
    with replacing(root / "file") as temporary:
        fill(temporary, letter)
    with replacing_folder(root / "folder", "2") as temporary:
        for name in "12":
            fill(temporary / name, letter)
    print(letter, flush=True)
"""
WHOLE = [letter * 64 * 4096 for letter in (b"a", b"b", b"c")]


@pytest.mark.exhaustive
def test_a_killed_writer(tmp_path):
    half_written = 0
    for kill in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.007 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (tmp_path / "file").read_bytes() in WHOLE
        folder = tmp_path / "folder"
        leftovers = [path for place in (tmp_path, folder) for path in place.iterdir() if is_temporary(path)]
        # The folder may be incomplete only if it lacks the file that comes last.
        if (folder / "2").exists():
            first, second = ((folder / name).read_bytes() for name in "12")
            assert first == second and first in WHOLE
        half_written += bool(leftovers)
        remove_temporaries(tmp_path)
        remove_temporaries(folder)
        assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    print(f"8 kills, {half_written} of them while something was half written")
    assert half_written


@pytest.fixture
def calls(monkeypatch):
    """All calls of `os.fsync` and `os.replace` so far, as pairs of "sync" or "rename" and the file name."""
    noted = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor):
        noted.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noting_replace(source, target):
        noted.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(atomic.os, "fsync", noting_fsync)
    monkeypatch.setattr(atomic.os, "replace", noting_replace)
    return noted


def test_content_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, calls):
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert calls == [("sync", temporary.name), ("rename", "file"), ("sync", tmp_path.name)]
    del calls[:]
    with replacing_folder(tmp_path / "folder", "file") as temporary:
        (temporary / "file").write_text("content")
    name = temporary.name
    assert calls == [("sync", "file"), ("sync", name), ("rename", "folder"), ("sync", tmp_path.name)]


def test_a_folder_is_removed_at_once_or_not(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []
