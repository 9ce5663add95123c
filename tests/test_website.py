"""Tests of the documentation site. They need the packages of `requirements-dev.txt`."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="builds the site: pip install -r requirements-dev.txt")
griffe = pytest.importorskip("griffe", reason="reads docstrings: pip install -r requirements-dev.txt")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "website"))
hooks = importlib.import_module("hooks")
sys.path.pop(0)


# For each notebook, a text that it must print.
PRINTED = {
    "tour_of_the_matrices": "Circulant                96 numbers   rank 96",
    "adapt_your_own_model": "refused: ",
    "the_papers_tables": "rank one",
}


@pytest.fixture(scope="module")
def package():
    return griffe.load("surm_jax", search_paths=[ROOT], resolve_aliases=True)


@pytest.mark.parametrize("name", hooks.PACKAGES)
def test_every_public_name_is_documented(name, package):
    names = hooks.public_names(importlib.import_module(name))
    assert names
    homes = [hooks.home(name, offered).removeprefix("surm_jax.") for offered in names]
    assert not [home for home in homes if not (package[home].docstring and package[home].docstring.value.strip())]


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[guide](docs/guide.md#images)", "[guide](guide.md#images)"),
        ("index.md", "![picture](docs/digits.png)", "![picture](digits.png)"),
        ("guide.md", "[start](../README.md)", "[start](index.md)"),
        ("results/index.md", "[speed](../../docs/speed.md)", "[speed](../speed.md)"),
        ("notebooks/the_papers_tables.md", "[all](../results/README.md)", "[all](../results/index.md)"),
        ("guide.md", "[keys](../surm_jax/tasks/config.py)", "[keys](api/surm_jax.tasks.md)"),
        ("guide.md", "[keys](../surm_jax/errors.py)", "[keys](api/surm_jax.md)"),
        # There is no page of the licence, and no such file: the first is shown as text, the second is reported.
        ("index.md", "[Apache-2.0](LICENSE)", "Apache-2.0"),
        ("index.md", "[gone](docs/gone.md)", "[gone](docs/gone.md)"),
        ("index.md", "[paper](https://arxiv.org/abs/2406.17740)", "[paper](https://arxiv.org/abs/2406.17740)"),
    ],
)
def test_links_between_files_become_links_between_pages(page, text, expected):
    class Page:
        class file:  # noqa: N801
            src_uri = page

    assert hooks.on_page_markdown(text, Page) == expected


@pytest.mark.exhaustive
def test_the_site_is_built_without_a_warning_and_stands_alone(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "website/mkdocs.yml", "-d", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "guide.html", "results/glue_minilm.html", "api/surm_jax.html"} <= pages.keys()
    # Nothing is loaded from other hosts.
    loaded = re.compile(r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="?(?:https?:)?//""")
    assert not [name for name, text in pages.items() if loaded.search(text)]
    # Examples in docstrings are shown as code, and notebooks with what they print and draw.
    assert "&gt;&gt;&gt; " not in re.sub(r"<code.*?</code>", "", pages["api/surm_jax.structured.html"], flags=re.DOTALL)
    assert {path.stem for path in (ROOT / hooks.NOTEBOOKS).glob("*.ipynb")} == PRINTED.keys()
    for name, printed in PRINTED.items():
        page = pages[f"notebooks/{name}.html"]
        assert printed in page and "<img" in page
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert any("circulant" in entry["text"].lower() for entry in index["docs"])
