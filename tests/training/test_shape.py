"""Check that the functions in surm_jax/training are short, and that its classes have few attributes."""

import ast
from pathlib import Path

import pytest

import surm_jax.training

FILES = sorted(Path(surm_jax.training.__file__).parent.glob("*.py"))
MOST_LINES, MOST_ATTRIBUTES = 60, 10
# Files that may have classes with many attributes. The classes in config.py have one attribute for each key of the
# configuration.
SECTIONS = ("config.py",)


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def attributes(node):
    """Return the attributes that a class sets in `__init__` or declares as annotated fields.

    Args:
        node: The syntax tree of the class.
    """
    fields = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            stored = [inner for inner in ast.walk(part) if isinstance(inner, ast.Attribute)]
            fields |= {inner.attr for inner in stored if isinstance(inner.ctx, ast.Store)}
    return fields


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_functions_fit_a_screen(path):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in SECTIONS], ids=lambda path: path.name)
def test_states_are_small(path):
    sizes = {node.name: len(attributes(node)) for node in nodes(path, ast.ClassDef)}
    assert {name: size for name, size in sizes.items() if size > MOST_ATTRIBUTES} == {}


def test_the_measures_see_what_they_should():
    text = "class A:\n    x: int = 1\n    def __init__(self):\n        self.y, self.z = 1, 2\n        self.y = self.q\n"
    (node,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert attributes(node) == {"x", "y", "z"}
