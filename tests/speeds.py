"""Mark the parameters of a test that only the full run uses."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fast(
    values: Iterable[Any], *chosen: Any, where: Callable[[Any], bool] | None = None, unpack: bool = False
) -> list[Any]:
    """Return values for `pytest.mark.parametrize`, and mark those as `exhaustive` that the fast run leaves out.

    Args:
        values: All values.
        *chosen: The values that the fast run keeps. Without any, and without `where`, it keeps the first value.
        where: A function that returns whether the fast run keeps a value, in place of `chosen`.
        unpack: Whether each value is a tuple of the values of several arguments of the test.
    """
    values = list(values)
    kept = [value for value in values if where(value)] if where else list(chosen) or values[:1]
    if unknown := [value for value in kept if value not in values]:
        raise ValueError(f"{unknown[0]!r} is not among the values: {values}")
    return [
        pytest.param(*(value if unpack else (value,)), marks=() if value in kept else pytest.mark.exhaustive)
        for value in values
    ]
