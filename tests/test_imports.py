"""Tests of the structure of `surm_jax`: which subpackages may import which others, and how long a file may be.

The tests do not import the files, but parse their source text.
"""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "surm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# For each subpackage of `surm_jax`, and for each file directly in `surm_jax`, the subpackages and files that it may
# import. Add a line for each new subpackage.
GROUND = {"errors", "paths", "atomic", "files", "tensor_files", "preparation"}
ARROWS = {
    "errors": set(),
    "paths": {"errors"},
    "atomic": set(),
    "files": {"errors"},
    "tensor_files": {"errors", "files"},
    "preparation": {"errors"},
    "devices": GROUND,
    "structured": GROUND | {"devices"},
    "data": GROUND,
    "peft": GROUND | {"devices", "structured"},
    "tree": GROUND | {"peft"},
    "models": GROUND,
    "pretrained": GROUND | {"models"},
    "tasks": GROUND | {"devices", "models", "pretrained", "data", "generation"},
    "generation": GROUND | {"models", "peft"},
    "record": GROUND | {"devices", "peft"},
    "training": GROUND
    | {"devices", "structured", "data", "peft", "models", "pretrained", "generation", "tasks", "record"},
    "versions": set(),
    "__init__": {"errors", "versions", "peft", "tree", "generation"},
    "__main__": GROUND | {"devices", "record", "training"},
}
MOST_FILES = 15
NOWHERE = {"torch", "torchvision", "tensorflow", "transformers", "peft"}


def package_of(path: Path) -> str:
    """Return the name of the subpackage of `surm_jax` that holds a file, or of the file itself if there is none."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the dotted names of everything that a file imports, also inside functions and by `import_module`.

    For `from a import b`, the name is `a.b`.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names |= {str(node.args[0].value)} if called in ("import_module", "__import__") else set()
    return names


def file_id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_is_in_the_table():
    assert {package_of(path) for path in FILES} == ARROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_arrows_go_one_way(path):
    package = package_of(path)
    ours = [name.split(".") for name in imported(path) if name.split(".")[0] == "surm_jax"]
    assert all(len(parts) > 1 for parts in ours), "the package itself imports peft: import from a part of it"
    assert {parts[1] for parts in ours} - {package} <= ARROWS[package]


def test_no_imports_go_round_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        # For `from package import name`, the dotted name `package.name` belongs to a module, or to an object in the
        # module `package`.
        found = {part if part in modules else part.rpartition(".")[0] for part in imported(path)}
        graph[name] = {other for other in found if other in modules and other != name}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_no_room_is_a_corridor(folder):
    assert len(list(folder.glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_other_frameworks_are_imported_nowhere(path):
    assert not {name.split(".")[0] for name in imported(path)} & NOWHERE


@pytest.mark.parametrize("path", [path for path in FILES if package_of(path) == "structured"], ids=file_id)
def test_structured_matrices_are_pure_jax(path):
    assert not [name for name in imported(path) if name.split(".")[0] == "flax"]


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_files_are_short_and_have_a_name(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.name not in ("utils.py", "util.py", "common.py", "helpers.py", "misc.py")


# What must not be loaded by `import surm_jax`, and by the program before the first step of a run.
SLOW = {"torch", "tensorflow", "tensorflow_datasets", "scipy.stats", "sklearn", "matplotlib", "tensorboardX"}
LATE = {"surm_jax": SLOW | {"grain", "orbax"}, "surm_jax.__main__": SLOW}


@pytest.mark.parametrize("module", LATE)
def test_an_import_loads_nothing_slow(module):
    program = f"import sys, {module}; print(*sys.modules)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert module in loaded
    assert not loaded & (NOWHERE | LATE[module])
