"""Check that the tables in markdown pages are up to date, and that the commands beside them make these tables."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import pages, pictures
from surm_jax.errors import UserError
from surm_jax.files import cache_root
from surm_jax.peft import METHODS
from surm_jax.training import base_config
from surm_jax.training.parsing import keys

ROOT = Path(__file__).resolve().parent.parent.parent
SPEED, SCALE, COUNTED = (ROOT / "docs" / f"{name}.md" for name in ("speed", "scale", "methods"))


def commands(page: Path) -> list[str]:
    return [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize(
    "page", [path for path in pages.all_pages(ROOT) if path != COUNTED], ids=lambda path: path.stem
)
def test_tables_are_up_to_date(page):
    pages.main(["--check", str(page)])


@pytest.mark.exhaustive
def test_counts_of_all_methods_are_up_to_date():
    pages.main(["--check", str(COUNTED)])


def test_every_method_is_listed():
    assert sorted(re.findall(r"^\| `(\w+)` \|", COUNTED.read_text(), re.MULTILINE)) == sorted(METHODS)


def test_a_stale_table_is_found_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "tables_of", lambda source: {"a b": "| new |"} if source == "m:x" else {})
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: m:x a b -->\n| old |\n<!-- end -->\n\nAfter.\n")
    with pytest.raises(UserError, match=r"stale: .*page.md: run python -m benchmarks.pages"):
        pages.main(["--check", str(page)])
    assert "| old |" in page.read_text()
    pages.main([str(page)])
    assert page.read_text() == "Before.\n\n<!-- table: m:x a b -->\n\n| new |\n\n<!-- end -->\n\nAfter.\n"
    pages.main(["--check", str(page)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: m:x ab -->\n<!-- end -->", r"m:x has no table 'ab'; did you mean 'a b'"),
        ("<!-- table: m:x a b -->\n", "a marker lacks its <!-- end -->"),
        ("<!-- table: m -->\n<!-- end -->", "or is not <!-- table: MODULE NAME -->"),
        ("<!-- code: absent.py -->\n<!-- end -->", "cannot read absent.py: No such file"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "tables_of", lambda source: {"a b": "| new |"})
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(UserError, match=r"page\.md: " + ".*" + message):
        pages.main([str(tmp_path / "page.md")])


def test_a_file_is_inserted_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- code: benchmarks/hlo.py -->\n<!-- end -->\n")
    pages.main([str(page)])
    code = (ROOT / "benchmarks" / "hlo.py").read_text()
    assert page.read_text() == f"<!-- code: benchmarks/hlo.py -->\n\n```python\n{code}```\n\n<!-- end -->\n"


@pytest.mark.parametrize("module", [pages, pictures])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--stray", 2)])
def test_help_and_stray_flags_write_nothing(module, argument, status, monkeypatch):
    for name in ("filled", "draw"):
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(SystemExit) as end:
        module.main([argument])
    assert end.value.code == status


@pytest.mark.parametrize("words", [text.split() for text in commands(SPEED)], ids=lambda words: " ".join(words)[10:60])
def test_commands_have_flags_that_exist_and_measure_the_rows_of_their_file(words):
    assert words[:2] == ["python", "-m"]
    package, module = words[2].split(".")
    source = (ROOT / package / f"{module}.py").read_text()
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert {*flags} <= {"out", *re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)}
    rows = json.loads((ROOT / flags["out"]).read_text())
    columns = {"methods": "method", "families": "family", "adapters": "adapters", "depths": "depth"}
    columns |= {"devices": "devices"}
    if "sizes" in flags:
        width, tokens = map(int, flags["sizes"].split("x"))
        rows = [row for row in rows if (row["width"], row["tokens"], row["dtype"]) == (width, tokens, flags["dtypes"])]
    for flag in columns.keys() & flags.keys():
        measured = {str(row[columns[flag]]) for row in rows} - {"frozen"}
        assert measured == {*flags[flag].split(",")}


def test_every_table_of_speed_has_a_command():
    assert len(commands(SPEED)) == SPEED.read_text().count("<!-- table:")


@pytest.mark.parametrize("command", commands(SCALE), ids=["tpu", "slurm", "hand"])
def test_commands_for_many_chips_have_data_weights_and_a_batch_that_divides(command, monkeypatch):
    words = [part for word in shlex.split(command) for part in shlex.split(word)]
    config = dict(word.removeprefix("--config.").split("=") for word in words if word.startswith("--config."))
    assert config.keys() <= {*keys(base_config())}
    assert config["data.dir"].startswith("/shared/")
    # The commands are for 256 chips, or for four nodes of 8 devices. A batch that 256 divides fits both numbers of
    # devices.
    assert all(int(config[f"data.{size}"]) % 256 == 0 for size in ("batch_size", "eval_batch_size"))
    (cache,) = [word.partition("=") for word in words if word.startswith("SURM_JAX_CACHE=")]
    monkeypatch.setenv(cache[0], cache[2])
    assert str(cache_root()) == "/shared/cache"
