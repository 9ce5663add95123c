"""Choose which of the tests that every matrix must pass belong to the fast run. The others are marked `exhaustive`.

These are the tests in `MatrixContract` and its subclasses.
"""

import pytest

from tests.structured.cases import MatrixContract

THOROUGH = ("TestCirculant", "TestLowRank", "TestLowDisplacementRank", "TestProduct")
"""Test classes of which all contract tests run by default.

They are for matrices with one array, with two arrays and with several terms, and for a matrix that consists of others.
"""

FIRST = (
    "test_apply_and_to_dense",
    "test_transpose_and_adjoint_identity",
    "test_gradients_of_every_leaf_and_of_x",
    "test_init_is_zero_and_can_learn",
    "test_nearest_finds_members_again_and_nothing_near_it_is_nearer",
)
"""Contract tests that run by default for all other test classes.

They test the values of the matrix, its gradients, its initialisation, and its approximation of a dense target.
"""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark the tests that are not chosen as `exhaustive`, except for those that a test class itself defines."""
    for item in items:
        cls = getattr(item, "cls", None)
        if cls is None or not issubclass(cls, MatrixContract) or cls.__name__ in THOROUGH:
            continue
        if item.originalname not in FIRST and item.originalname not in vars(cls):
            item.add_marker(pytest.mark.exhaustive)
