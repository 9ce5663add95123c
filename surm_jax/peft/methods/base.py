"""What an update is, and the registry of updates by name.

An *update* puts a structured matrix beside the kernels that its rule matches. Adding one means one file beside this
one, a line in `__init__.py`, and an entry in `tests/peft/cases.py`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax

from surm_jax.errors import UserError, did_you_mean
from surm_jax.structured import StructuredMatrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update(abc.ABC):
    """How the matrix of a LoRA-style update is made. Subclasses are registered under their `name`.

    A setting is a number or a boolean. A number must not be 0 unless its field has `metadata={"least": 0}`.

    Attributes:
      alpha: what the update is multiplied with: `W + alpha * dW` (SURM, arXiv 2406.17740, section 4.1).
    """

    name: ClassVar[str]
    alpha: float = 1.0

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.name in UPDATES:
            raise UserError(f"{cls.__name__} needs a name of its own: {cls.name!r} is {UPDATES[cls.name].__name__}")
        UPDATES[cls.name] = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "least" in field.metadata:
                if not value >= field.metadata["least"]:
                    raise UserError(f"{self.name}.{field.name} must be at least {field.metadata['least']}, got {value}")
            elif not math.isfinite(value) or value == 0:
                # With a factor of 0, or a random factor of 0 beside the one that starts at 0, nothing would ever learn.
                raise UserError(f"{self.name}.{field.name} must be finite and not 0, got {value}: it would never learn")

    def factor(self, shape: tuple[int, int]) -> float:
        """Returns the number that multiplies the matrix of the given (in_features, out_features)."""
        del shape
        return self.alpha

    @abc.abstractmethod
    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Returns the matrix of the given (in_features, out_features) that training starts from: zero as a product."""


UPDATES: dict[str, type[Update]] = {}


def make_update(name: str, settings: dict[str, Any]) -> Update:
    """Builds the registered update `name` with its settings.

    >>> from surm_jax.peft import make_update
    >>> make_update("lora", {"rank": 2})
    LoRA(alpha=1.0, rank=2)

    Raises:
      UserError: for an unknown name or setting; the message names the nearest one.
    """
    if name not in UPDATES:
        raise UserError(f"no update is called {name!r}{did_you_mean(name, UPDATES)} (known: {', '.join(UPDATES)})")
    known = {field.name: field.type for field in dataclasses.fields(UPDATES[name])}
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
        if isinstance(value, bool) or not isinstance(value, int if known[key] is int else int | float):
            raise UserError(f"{name}.{key} must be {'a whole' if known[key] is int else 'a'} number, got {value!r}")
    return UPDATES[name](**settings)
