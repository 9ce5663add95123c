import ast
from pathlib import Path

import pytest

import surm_jax
from surm_jax.peft.parts.base import SLOTS, adapter_of

PACKAGE = Path(surm_jax.__file__).parent


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("head/kernel", None),
        ("delta/default/r1", "default"),
        ("blocks/0/mlp/branch/second/down/W", "second"),
        ("blocks/0/query/delta/default/terms_0_matrix_r1", "default"),
        ("branch/query/delta/default/r1", "default"),
    ],
)
def test_the_adapter_of_a_path(path, name):
    assert adapter_of(tuple(path.split("/"))) == name


def test_the_words_of_the_slots_stand_in_one_file():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in SLOTS:
                found.add(str(path.relative_to(PACKAGE)))
    assert found == {"peft/parts/base.py"}
