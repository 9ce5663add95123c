"""Insert generated tables and files of code into hand-written markdown pages.

    python -m benchmarks.pages [--check] [PAGE ...]

A page marks the places with comments. The text between `<!-- table: MODULE NAME -->` and `<!-- end -->` is replaced by
the value of NAME in the dictionary that `MODULE.tables()` returns. With `MODULE:ARGUMENT` instead of MODULE, the
function is called as `tables(ARGUMENT)`. The text between `<!-- code: FILE -->` and `<!-- end -->` is replaced by the
content of a Python file. Everything else stays as it is.

Without PAGE, the command updates README.md and all pages in `docs/` and `experiments/results/`. With `--check` it
writes nothing, and fails if a page is not up to date.
"""

import argparse
import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.command import command
from surm_jax.errors import UserError, did_you_mean

TABLE = re.compile(r"(<!-- table: (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"(<!-- code: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def tables_of(source: str) -> Mapping[str, str]:
    """Import a module and return its tables by name.

    Args:
        source: `MODULE` to call its function `tables()`, or `MODULE:ARGUMENT` to call `tables(ARGUMENT)`.
    """
    module, _, argument = source.partition(":")
    make = importlib.import_module(module).tables
    return make(argument) if argument else make()


def filled(text: str) -> str:
    """Return the text of a page in which every inserted table and file of code is up to date.

    Args:
        text: The text of the page as it is now.

    Raises:
        UserError: A marker lacks its `<!-- end -->`, or names a table or a file that does not exist.
    """

    def table(match: re.Match[str]) -> str:
        begin, source, name, end = match.groups()
        tables = tables_of(source)
        if name not in tables:
            raise UserError(f"{source} has no table {name!r}{did_you_mean(name, tables)}")
        return f"{begin}\n{tables[name].strip()}\n\n{end}"

    def code(match: re.Match[str]) -> str:
        begin, file, end = match.groups()
        try:
            content = (ROOT / file).read_text()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        return f"{begin}\n```python\n{content.strip()}\n```\n\n{end}"

    if len(TABLE.findall(text)) + len(CODE.findall(text)) != text.count("<!-- table:") + text.count("<!-- code:"):
        raise UserError("a marker lacks its <!-- end -->, or is not <!-- table: MODULE NAME --> or <!-- code: FILE -->")
    return CODE.sub(code, TABLE.sub(table, text))


def all_pages(root: Path) -> list[Path]:
    """Return the paths of README.md and of all markdown pages in `docs/` and `experiments/results/`."""
    return [root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("experiments/results/*.md"))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Update the pages, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a page is stale")
    options = parser.parse_args(arguments)
    stale = []
    for page in options.pages or all_pages(Path()):
        try:
            text = page.read_text()
            new = filled(text)
        except UserError as error:
            raise UserError(f"{page}: {error}") from None
        if new != text:
            stale.append(str(page))
            if not options.check:
                page.write_text(new)
    if options.check and stale:
        raise UserError(f"stale: {', '.join(stale)}: run python -m benchmarks.pages")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale) or 'nothing'}")


if __name__ == "__main__":
    command(main)
