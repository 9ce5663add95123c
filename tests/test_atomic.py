"""Tests of `replacing` and `replacing_folder`, which write a file or folder either completely or not at all."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from surm_jax import atomic
from surm_jax.atomic import replacing, replacing_folder
from tests.survival.test_disk_full import ROOT, can_mount


def write(path, content="new"):
    with replacing(Path(path)) as temporary:
        temporary.write_text(content)


def fill(folder, **contents):
    with replacing_folder(Path(folder), last="last") as temporary:
        for name, content in {**contents, "last": "new"}.items():
            (temporary / name).write_text(content)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_success_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for content in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent  # os.replace is atomic only within one file system.
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_failure_keeps_what_was_there(tmp_path):
    for name in ("file", "last"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), replacing_folder(tmp_path, "last") as temporary:
        (temporary / "last").write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"file": "old", "last": "old"}


@pytest.mark.parametrize("old", ["old", None], ids=["file", "nothing"])
def test_a_link_stays_and_leads_to_the_new_file(tmp_path, old):
    (tmp_path / "there").mkdir()
    (tmp_path / "second").symlink_to("there/file")
    (tmp_path / "first").symlink_to("second")
    if old:
        (tmp_path / "there" / "file").write_text(old)
    write(tmp_path / "first")
    assert contents(tmp_path / "there") == {"file": "new"}
    assert os.readlink(tmp_path / "first") == "second" and os.readlink(tmp_path / "second") == "there/file"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_circle_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "a")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_file_keeps_its_mode_also_while_it_is_written(tmp_path, mode):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    with replacing(path) as temporary:
        assert temporary.stat().st_mode & 0o777 == mode
        temporary.unlink()
        temporary.write_text("new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", mode)


def test_what_must_not_be_written_is_refused_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(atomic.os, "access", lambda path, mode: False)
    for path, kind in ((tmp_path / "file", PermissionError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind) as error, replacing(path):
            pytest.fail("the block ran")
        assert error.value.filename == str(path)
    assert contents(tmp_path) == {"file": "old"}


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(IsADirectoryError) as error, replacing(tmp_path / "file") as temporary:
        temporary.unlink()
        temporary.mkdir()
        temporary.write_text("new")
    assert str(error.value) == f"[Errno 21] Is a directory: '{tmp_path / 'file'}'"


def test_the_longest_name_can_be_written(tmp_path):
    write(tmp_path / ("ä" * 127))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_named_pipe_gets_the_content_once_it_is_complete(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(RuntimeError), replacing(pipe) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write(pipe)
    reader.join()
    assert read == ["new"] and pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_stays_a_device():
    write("/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["/dev/stdout", "out"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_the_standard_output_is_written_in_order(tmp_path, kind, name):
    program = (
        "import pathlib\nfrom surm_jax.atomic import replacing\nprint('before')\n"
        f"with replacing(pathlib.Path({name!r})) as new:\n    new.write_text('new\\n')\nprint('after')"
    )
    if kind == "pipe" and name == "out":
        os.mkfifo(tmp_path / "out")
        descriptor = os.open(tmp_path / "out", os.O_RDWR)
    elif kind == "pipe":
        descriptor = subprocess.PIPE
    else:
        descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=descriptor, check=True)
    if kind == "file":
        written = (tmp_path / "out").read_bytes()
    else:
        written = done.stdout or os.read(descriptor, 1000)
    assert written == b"before\nnew\nafter\n"


@pytest.mark.parametrize("place", ["link", ".", "folder"])
def test_a_folder_stays_and_its_files_are_replaced(tmp_path, monkeypatch, place):
    folder, link = tmp_path / "there" / "folder", tmp_path / "link"
    folder.mkdir(parents=True)
    folder.chmod(0o750)
    link.symlink_to(folder)
    (tmp_path / "elsewhere").write_text("old")
    for name in ("gone", "private", "last"):
        (folder / name).write_text("old")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "private").chmod(0o600)
    monkeypatch.chdir(folder if place == "." else tmp_path)
    before = folder.stat()
    with subprocess.Popen(["sh", "-c", "read line; cat last"], cwd=folder, stdin=-1, stdout=-1, text=True) as shell:
        fill({"link": link, ".": "."}.get(place, folder), linked="new", private="new")
        # A process that stands in the folder sees the new file.
        assert shell.communicate("\n")[0] == "new"
    assert contents(folder) == {"linked": "new", "private": "new", "last": "new"}
    assert (tmp_path / "elsewhere").read_text() == "new" and link.is_symlink()
    assert (folder / "private").stat().st_mode & 0o777 == 0o600
    assert os.path.samestat(before, folder.stat()) and folder.stat().st_mode == before.st_mode
    assert [*folder.parent.iterdir()] == [folder]


def test_a_new_folder_has_its_name_when_it_is_complete(tmp_path):
    (tmp_path / "link").symlink_to("below/folder")
    with replacing_folder(tmp_path / "link", "last") as temporary:
        (temporary / "last").write_text("new")
        assert not (tmp_path / "below" / "folder").exists()
    assert contents(tmp_path / "link") == {"last": "new"}
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["folder"]


def test_the_last_file_is_there_only_while_the_folder_is_complete(tmp_path, monkeypatch):
    fill(tmp_path, a="old", b="old", c="old")
    states, replace = [], os.replace

    def noting(source, target):
        states.append({path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()})
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", noting)
    fill(tmp_path, a="new", b="new")
    states.append(contents(tmp_path))
    complete = [state for state in states if "last" in state]
    assert complete[0]["a"] == complete[0]["b"] == complete[0]["c"] == "old"
    assert complete[1:] == [{"a": "new", "b": "new", "last": "new"}]
    assert len(states) > 4


MOUNTED = """
mkdir "$0/folder" && mount -t tmpfs none "$0/folder" && touch "$0/file" "$0/other"
mount --bind "$0/other" "$0/file" && exec "$@"
"""


@pytest.mark.exhaustive
def test_mount_points_are_written_through(tmp_path):
    if not can_mount():
        pytest.skip("needs a user namespace to mount file systems in (unshare -rm)")
    program = (
        "import sys; from pathlib import Path; from tests.test_atomic import *; root = Path(sys.argv[1])\n"
        "write(root / 'file')\nassert os.path.samefile(root / 'file', root / 'other')\n"
        "for content in 'ab':\n    fill(root / 'folder', a=content)\n"
        "assert contents(root / 'folder') == {'a': 'b', 'last': 'new'} and os.path.ismount(root / 'folder')"
    )
    command = ["unshare", "-rm", "sh", "-c", MOUNTED, str(tmp_path), sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert contents(tmp_path / "folder") == {}
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {
        "file": "",
        "other": "new",
    }
