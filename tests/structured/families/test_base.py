"""Test that every family is exported and tested, and test `options_within`, `random` and the decorator `family`."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surm_jax.structured
from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, Circulant, Family, StructuredMatrix, family
from tests.speeds import fast
from tests.structured.cases import ProjectionContract, StructuredMatrixContract

OURS = {name: cls for name, cls in FAMILIES.items() if cls.__module__.startswith("surm_jax.")}


def test_every_family_has_a_test_case():
    for file in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.structured.families.{file.stem}")
    cases = (*StructuredMatrixContract.__subclasses__(), *ProjectionContract.__subclasses__())
    tested = {case.family for case in cases if case is not ProjectionContract}
    assert {name for name, cls in OURS.items() if cls not in tested} == set()


def test_every_family_is_exported_under_its_name():
    assert OURS
    for name, cls in OURS.items():
        assert cls.__name__ == name
        assert getattr(surm_jax.structured, cls.__name__) is cls


def test_titles_are_different():
    assert len({cls.example().title for cls in OURS.values()}) == len(OURS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", fast([(8, 8), (6, 9), (12, 8)], (6, 9)), ids=str)
def test_options_within_a_budget_are_the_largest(name, shape):
    cls = FAMILIES[name]
    counts = []
    for budget in range(shape[0] * shape[1] + 1):
        options = cls.options_within(shape, budget)
        counts.append(0 if options is None else cls.count(shape, **options))
        assert counts[-1] <= budget
    assert counts == sorted(counts) and counts[-1] > 0


def test_a_name_is_given_once():
    before = dict(FAMILIES)
    with pytest.raises(
        UserError, match=r"there already is a family Circulant \(surm_jax.structured.families.circulant\)"
    ):
        family(type("Circulant", (Circulant,), {}))
    assert before == FAMILIES


def test_what_is_no_family():
    with pytest.raises(UserError, match=r"Half lacks T, _apply, _dense, nearest, which every family must define"):

        @family
        class Half(Family):
            init = Circulant.init

    with pytest.raises(UserError, match=r"Other must be a subclass of surm_jax.structured.Family"):
        family(type("Other", (StructuredMatrix,), {}))
    assert not {"Half", "Other"} & set(FAMILIES)


def test_random_is_the_same_in_every_call():
    one, other = Circulant.random((3, 5), scale=0.5), Circulant.random((3, 5))
    np.testing.assert_array_equal(one.c, Circulant.random((3, 5), scale=0.5).c)
    np.testing.assert_allclose(2 * one.c, other.c)
    assert one.shape == (3, 5) and Circulant.random((3, 5), dtype="bfloat16").c.dtype == jnp.bfloat16
    assert Circulant.count((3, 5)) == 5 and isinstance(Circulant.example().c, jax.Array)
