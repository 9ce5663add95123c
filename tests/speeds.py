"""Parameters of tests that run in two speeds."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the values as parameters of a test, where only the chosen ones (or the first) run in the fast run."""
    values = list(values)
    kept = list(chosen) or values[:1]
    if unknown := [value for value in kept if value not in values]:
        raise ValueError(f"{unknown[0]!r} is not among the values: {values}")
    return [value if value in kept else _exhaustive(value) for value in values]


def _exhaustive(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)
