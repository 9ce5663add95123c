"""Tests of `replacing` and `replacing_folder`, which write a file or folder either completely or not at all."""

from pathlib import Path

import pytest

from surm_jax.files import replacing, replacing_folder


def test_success_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for content in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent  # os.replace is atomic only within one file system.
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["link", "."])
def test_a_folder_behind_a_link_or_a_dot_is_replaced_itself(tmp_path, monkeypatch, place):
    folder, link = tmp_path / "there" / "folder", tmp_path / "link"
    folder.mkdir(parents=True)
    (folder / "old").touch()
    link.symlink_to(folder)
    monkeypatch.chdir(folder if place == "." else tmp_path)
    with replacing_folder(Path(place)) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert link.is_symlink() and [path.name for path in link.iterdir()] == ["new"]
    assert [*folder.parent.iterdir()] == [folder]
    assert {*tmp_path.iterdir()} == {link, folder.parent}
