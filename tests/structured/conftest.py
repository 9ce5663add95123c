"""The two speeds of the contract of matrices."""

import pytest

from tests.structured.cases import MatrixContract

THOROUGH = ("TestCirculant", "TestLowRank", "TestLowDisplacementRank", "TestProduct")
"""Kinds of matrices whose whole contract belongs to the fast run: one, two and several arrays, and composites."""

FIRST = (
    "test_apply_and_to_dense",
    "test_transpose_and_adjoint_identity",
    "test_gradients_of_every_leaf_and_of_x",
    "test_init_is_zero_and_can_learn",
    "test_nearest_finds_members_again_and_nothing_near_it_is_nearer",
)
"""What the fast run shows of every other kind: its values, its gradients, its start and its projection."""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Leave the rest of the contract of the other kinds to the exhaustive run."""
    for item in items:
        cls = getattr(item, "cls", None)
        if cls is None or not issubclass(cls, MatrixContract) or cls.__name__ in THOROUGH:
            continue
        if item.originalname not in FIRST and item.originalname not in vars(cls):
            item.add_marker(pytest.mark.exhaustive)
