"""What the documentation site takes from outside of `docs/`: README, results, notebooks, and the reference.

MkDocs calls `on_files` once and `on_page_markdown` for each page. A page keeps its place in the repository, so that its
links work there too. Here they are turned into links between the pages of the site.
"""

import importlib
import inspect
import os
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from doctests import fenced  # noqa: E402 - A module beside this file, which MkDocs does not put on the path.

ROOT = HERE.parent
ROOMS = ("structured", "peft", "models", "pretrained", "data", "generation", "tasks", "training")
PACKAGES = ("surm_jax", *(f"surm_jax.{room}" for room in ROOMS))

# The pages from outside of `docs/`, by their place in the repository.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/results/README.md": "results/index.md",
}
RESULTS = "experiments/results"
NOTEBOOKS = "experiments/notebooks"

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def public_names(module: ModuleType) -> list[str]:
    """Return the names that a package offers: those that it imports from its own modules, without the modules."""
    return [
        name
        for name in getattr(module, "__all__", None) or vars(module)
        if not name.startswith("_") and not inspect.ismodule(getattr(module, name)) and name != "require_versions"
    ]


def home(package: str, name: str) -> str:
    """Return the full name of an object where it is defined, such as `surm_jax.peft.adapt.adapt`.

    The shorter name that the package offers may also be that of a module.
    """
    value = getattr(importlib.import_module(package), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{package}.{name}"


def reference() -> dict[str, str]:
    """Return the pages of the reference by package. Each public name is described once, and linked elsewhere."""
    pages: dict[str, str] = {}
    described: set[str] = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        homes = {name: home(package, name) for name in sorted(public_names(module), key=str.lower)}
        links = ", ".join(f"[`{name}`][{place}]" for name, place in homes.items() if place in described)
        also = f"\n\nAlso offered here, and described on other pages: {links}." if links else ""
        blocks = [f"::: {place}" for place in homes.values() if place not in described]
        described.update(homes.values())
        pages[package] = "\n\n".join([f"# {package}\n\n{fenced(inspect.getdoc(module))}{also}", *blocks])
    return pages


def notebook_page(path: Path, files: Files, config: MkDocsConfig) -> str:
    """Run a notebook, return it as markdown with its outputs, and add its pictures to the files of the site."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = str(ROOT)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    exporter = MarkdownExporter()
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    text, resources = exporter.from_notebook_node(notebook)
    for name, content in resources["outputs"].items():
        picture = f"{path.stem}_{name}"
        files.append(File.generated(config, f"notebooks/{picture}", content=content))
        text = text.replace(f"({name})", f"({picture})")
    return text


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside of `docs/`."""
    places = {ROOT / place: page for place, page in PAGES.items()}
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".md", ".png") and path not in places:
            places[path] = f"results/{path.name}"
    for path, page in places.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        text = notebook_page(path, files, config)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    files.append(File.generated(config, "style.css", abs_src_path=str(HERE / "style.css")))
    for package, text in reference().items():
        files.append(File.generated(config, f"api/{package}.md", content=text))
    return files


def place_of(page: str) -> str:
    """Return the place in the repository of the file from which a page of the site is made."""
    for place, made in PAGES.items():
        if page == made:
            return place
    folder, _, name = page.partition("/")
    if folder == "results":
        return f"{RESULTS}/{name}"
    if folder == "notebooks":
        return f"{NOTEBOOKS}/{Path(name).stem}.ipynb"
    return f"docs/{page}"


def page_of(place: str) -> str | None:
    """Return the page or picture of the site that is made from a file of the repository, or None if there is none.

    A source file of the package belongs to the reference of its package.
    """
    if place in PAGES:
        return PAGES[place]
    folder, name = posixpath.split(place)
    if folder == RESULTS and name.endswith((".md", ".png")):
        return f"results/{name}"
    if folder == NOTEBOOKS and name.endswith(".ipynb"):
        return f"notebooks/{Path(name).stem}.md"
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    if place.startswith("surm_jax/") and place.endswith(".py"):
        packages = [name for name in PACKAGES if place.startswith(name.replace(".", "/") + "/")]
        return f"api/{max(packages, key=len)}.md"
    return None


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links to files of the repository into links to pages of the site. A link to any other file becomes text."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    folder = posixpath.dirname(place_of(here))

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / place).exists():
            # MkDocs names the broken link.
            return found[0]
        to = page_of(place)
        if to is None:
            return text
        return f"{mark}[{text}]({os.path.relpath(to, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    return _LINK.sub(link, markdown)
