"""Check the settings of methods: which values a field may have, and the error messages for other values."""

import dataclasses
import math
from typing import Any

from surm_jax.errors import UserError, did_you_mean

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a name"}

# The largest number that a setting may have. With larger ones, array sizes and squares of float32 numbers overflow.
_LARGEST = 10**18


def at_least(default: float, least: float, below: float = math.inf) -> Any:
    """Return a dataclass field for a number that must be at least `least` and less than `below`."""
    return dataclasses.field(default=default, metadata={"least": least, "below": below})


def one_of(default: str, names: tuple[str, ...]) -> Any:
    """Return a dataclass field for a setting that must be one of several names."""
    return dataclasses.field(default=default, metadata={"one_of": names})


def check_setting(method: str, field: dataclasses.Field, value: Any, *, may_be_zero: bool = False) -> None:
    """Check the value of a setting.

    The value must have the type of the field; a `float` field also accepts an `int`. It must lie within the limits that
    `at_least` or `one_of` declares. Without declared limits, an `int` must be at least 1, and a `float` must not be 0.
    All numbers must be finite, and at most 1e18 in absolute value.

    Args:
        method: The name of the method, for messages.
        field: The dataclass field of the setting.
        value: The value.
        may_be_zero: Whether 0 is allowed even if the limits exclude it.

    Raises:
        UserError: If the value is not allowed.
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
        # One array of a matrix starts at 0. If its factor or the scale of another array is 0 too, gradients stay 0.
        raise UserError(f"{where} must be finite and not 0, got {value}: it would never learn")
