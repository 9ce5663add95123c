"""Test which files and lines are read as JSON lines, and what is said about the others."""

import json

import pytest

from surm_jax.data.lm.lines import load_lines
from surm_jax.errors import UserError

GOOD = {"text": "It rains."}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_a_folder_and_a_pattern_have_the_same_splits(tmp_path):
    train = write(tmp_path / "a.jsonl", GOOD, "", {"prompt": "", "completion": "x", "id": 3})
    write(tmp_path / "a_test.jsonl", GOOD)
    alone = load_lines(str(train))
    assert [line.form for line in alone.train.lines] == ["text", "prompt"]
    assert (list(alone.tests), alone.train.lines[1].place) == (["test"], f"{train}, line 3")
    write(tmp_path / "b.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    write(tmp_path / "validation.jsonl", GOOD, GOOD)
    for name in (tmp_path, tmp_path / "*.jsonl"):
        found = load_lines(str(name))
        assert [line.form for line in found.train.lines] == ["text", "prompt", "messages"]
        assert {split: len(source) for split, source in found.tests.items()} == {"test": 1, "validation": 2}
        assert len(found.files) == 4


BAD = {
    "{": "not JSON",
    "[1]": "JSON object was expected",
    "[" * 100_000: "not JSON",
    '{"texts": ""}': "exactly one form",
    '{"text": "a", "prompt": "b"}': "exactly one form",
    '{"text": ""}': "text is empty",
    '{"prompt": "a"}': "no completion",
    '{"prompt": "a", "completion": ""}': "completion is empty",
    '{"prompt": ["a"], "completion": "b"}': "prompt must be text, got list",
    '{"messages": []}': "list of objects",
    '{"messages": [{"role": "user", "content": "a"}]}': "no message of the assistant",
    '{"messages": [{"role": "assistant", "content": ""}]}': "content is empty",
    '{"messages": [{"role": "assistant"}]}': "has no content",
    '{"messages": [{"content": "a"}]}': "no role",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_a_malformed_line_is_named_and_counted(tmp_path, line):
    path = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(UserError, match=f"a.jsonl, line 2: .*{BAD[line]}.*max_corrupt lets 0") as caught:
        load_lines(str(path))
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="line 2"):
        source = load_lines(str(path), max_corrupt=1).train
    assert len(source) == 2
    assert len(source.malformed) == 1


def test_a_file_that_is_still_being_written(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "whole"}\n{"text": "ha')
    with pytest.raises(UserError, match=r"line 2: .*is the file still being written"):
        load_lines(str(path))
    path.write_bytes(b'{"text": "whole"}\n{"text": "no break"}')
    assert len(load_lines(str(path)).train) == 2


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "no such file"), ("empty.jsonl", "no line is a text")])
def test_nothing_to_read(tmp_path, name, message):
    write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=message):
        load_lines(str(tmp_path / name))
    write(tmp_path / "test.jsonl", GOOD), write(tmp_path / "a_test.jsonl", GOOD)
    (tmp_path / "empty.jsonl").unlink()
    with pytest.raises(UserError, match="only files for evaluation"):
        load_lines(str(tmp_path))
