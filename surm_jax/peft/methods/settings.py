"""The settings of methods: which values a field may have, and the messages where it has another."""

import dataclasses
import math
from typing import Any

from surm_jax.errors import UserError, did_you_mean

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a name"}

# Sizes of arrays and float32 numbers overflow beyond it.
_LARGEST = 10**18


def at_least(default: float, least: float, below: float = math.inf) -> Any:
    """Declare a setting that may be anything from `least` on, and below `below`."""
    return dataclasses.field(default=default, metadata={"least": least, "below": below})


def one_of(default: str, names: tuple[str, ...]) -> Any:
    """Declare a setting that is one of several names."""
    return dataclasses.field(default=default, metadata={"one_of": names})


def check_setting(method: str, field: dataclasses.Field, value: Any, *, may_be_zero: bool = False) -> None:
    """Check the value of a setting. A number must be finite and not 0, unless its field declares something else.

    Args:
        method: Name of the method, for messages.
        field: The field, perhaps made by `at_least` or `one_of`.
        value: Its value.
        may_be_zero: Whether 0 is possible in any case.

    Raises:
        UserError: If the value is not possible.
    """
    kind: Any = field.type
    where, limits = f"{method}.{field.name}", field.metadata
    if not (type(value) is kind or (kind is float and type(value) is int)):
        raise UserError(f"{where} must be {_KINDS[kind]}, got {value!r}")
    if kind in (int, float) and abs(value) > _LARGEST:
        raise UserError(f"{where} must be finite and at most {_LARGEST:g}, got {value}")
    if "one_of" in limits:
        if value not in limits["one_of"]:
            near = did_you_mean(str(value), limits["one_of"])
            raise UserError(f"{where} must be one of {', '.join(limits['one_of'])}, got {value!r}{near}")
    elif kind in (bool, str) or (may_be_zero and value == 0):
        pass
    elif "least" in limits:
        if not (value >= limits["least"] and value < limits["below"]):
            below = f" and below {limits['below']:g}" if math.isfinite(limits["below"]) else ""
            raise UserError(f"{where} must be at least {limits['least']}{below}, got {value}")
    elif kind is int and value < 1:
        raise UserError(f"{where} must be at least 1, got {value}")
    elif math.isnan(value) or value == 0:
        # If the factor, or the random array beside the one that starts at 0, is 0, nothing ever learns.
        raise UserError(f"{where} must be finite and not 0, got {value}: it would never learn")
