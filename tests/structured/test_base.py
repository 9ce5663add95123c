"""The register of families: complete, named once, and every family tested."""

import importlib
import pkgutil
from pathlib import Path

import jax.numpy as jnp
import pytest

import surm_jax.structured
from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, StructuredMatrix, compute_dtype, family
from tests.structured.cases import ProjectionContract, StructuredMatrixContract


def test_every_registered_family_has_a_test_case():
    for module in pkgutil.iter_modules(surm_jax.structured.__path__):
        importlib.import_module(f"surm_jax.structured.{module.name}")
    for file in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.structured.{file.stem}")
    cases = (*StructuredMatrixContract.__subclasses__(), *ProjectionContract.__subclasses__())
    tested = {case.family for case in cases if case is not ProjectionContract}
    assert {name for name, cls in FAMILIES.items() if cls not in tested} == set()


def test_every_family_is_exported_under_its_name():
    assert FAMILIES
    for name, cls in FAMILIES.items():
        assert cls.__name__ == name
        assert getattr(surm_jax.structured, cls.__name__) is cls


def test_a_name_is_given_once():
    before = dict(FAMILIES)
    with pytest.raises(
        UserError, match=r"there already is a family Circulant \(surm_jax.structured.families.circulant\)"
    ):
        family(type("Circulant", (StructuredMatrix,), {}))
    assert before == FAMILIES


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16",), "float32"),
        (("float16", "bfloat16"), "float32"),
        (("bfloat16", "float32"), "float32"),
        (("bfloat16", "float64"), "float64"),
    ],
)
def test_compute_dtype(dtypes, expected):
    assert compute_dtype(*map(jnp.dtype, dtypes)) == jnp.dtype(expected)
