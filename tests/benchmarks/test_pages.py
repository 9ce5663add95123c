"""The pages that commands write: up to date, with commands that measure what they show, and written only when asked."""

import json
import re
import shlex

import pytest

from benchmarks import pictures, report, scale
from docs import list_methods
from surm_jax.files import cache_root
from surm_jax.training import base_config
from surm_jax.training.config import keys

PAGE = (report.ROOT / "docs" / "speed.md").read_text()
COMMANDS = [block.replace("\\\n", " ").split() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]


@pytest.mark.parametrize("module", [report, scale, list_methods, pictures])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("stray", 2)])
def test_help_and_stray_words_write_nothing(module, argument, status, monkeypatch):
    for name in ("page", "row", "draw"):
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(SystemExit) as end:
        module.main([argument])
    assert end.value.code == status


def test_the_page_is_that_of_the_results():
    assert report.page() == PAGE


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[10:60])
def test_commands_name_flags_that_are_there_and_the_rows_of_their_file(words):
    assert words[:2] == ["python", "-m"]
    package, module = words[2].split(".")
    source = (report.ROOT / package / f"{module}.py").read_text()
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert {*flags} <= {"out", *re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)}
    rows = json.loads((report.ROOT / flags["out"]).read_text())
    columns = {"methods": "method", "families": "family", "adapters": "adapters", "depths": "depth"}
    columns |= {"devices": "devices"}
    if "sizes" in flags:
        width, tokens = map(int, flags["sizes"].split("x"))
        rows = [row for row in rows if (row["width"], row["tokens"], row["dtype"]) == (width, tokens, flags["dtypes"])]
    for flag in columns.keys() & flags.keys():
        measured = {str(row[columns[flag]]) for row in rows} - {"frozen"}
        assert measured == {*flags[flag].split(",")}


def test_every_table_of_the_page_has_a_command():
    assert len(COMMANDS) == PAGE.count("\n## ") - 1 == len(re.findall(r"\n\|[-:|]+\|\n", PAGE))


def test_the_commands_for_many_chips_are_on_their_page():
    ours = scale.TEXT.partition("## What is where")[0]
    assert "/shared/tfds" in ours and scale.PAGE.read_text().startswith(ours)


@pytest.mark.parametrize("command", re.findall(r"```sh\n(.*?)```", scale.TEXT, re.DOTALL), ids=["tpu", "slurm", "hand"])
def test_commands_for_many_chips_have_data_weights_and_a_batch_that_divides(command, monkeypatch):
    words = [part for word in shlex.split(command.replace("\\\n", " ")) for part in shlex.split(word)]
    config = dict(word.removeprefix("--config.").split("=") for word in words if word.startswith("--config."))
    assert config.keys() <= {*keys(base_config())}
    assert config["data.dir"].startswith("/shared/")
    # A pod of 256 chips, or four nodes of eight.
    assert all(int(config[f"data.{size}"]) % 256 == 0 for size in ("batch_size", "eval_batch_size"))
    (cache,) = [word.partition("=") for word in words if word.startswith("SURM_JAX_CACHE=")]
    monkeypatch.setenv(cache[0], cache[2])
    assert str(cache_root()) == "/shared/cache"
