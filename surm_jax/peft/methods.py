"""The methods by name. Adding an update means one class here; adding a selection, one line.

An *update* puts a structured matrix beside the kernels that its rule matches. A *selection* adds nothing and trains
what is there.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax

from surm_jax.errors import UserError, did_you_mean
from surm_jax.structured import CirculantPair, LowRank, StructuredMatrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update(abc.ABC):
    """How the matrix of a LoRA-style update is made. Subclasses are registered under their `name`.

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
        # With a factor of 0, or a random factor of 0 beside the one that starts at 0, nothing would ever learn.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value == 0:
                raise UserError(f"{self.name}.{field.name} must be finite and not 0, got {value}: it would never learn")

    @property
    def factor(self) -> float:
        """The number that multiplies the matrix."""
        return self.alpha

    @abc.abstractmethod
    def init(self, key: jax.Array, shape: tuple[int, int]) -> StructuredMatrix:
        """Returns the matrix of the given (in_features, out_features) that training starts from: zero as a product."""


UPDATES: dict[str, type[Update]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CirculantUpdate(Update):
    """The circulant of `r1 * r2`: 2n numbers trained, n stored; r1 starts at 0, r2 at `scale * N(0, 1)`.

    SURM, arXiv 2406.17740, section 4.1. The learning rate is that of r1 and r2 as they are (no division by n), and the
    first step of r1 grows with `scale`, that of the update with its square.

    >>> matrix = CirculantUpdate(scale=0.02).init(jax.random.key(0), (768, 768))
    >>> matrix.num_params, matrix.fused().num_params
    (1536, 768)
    """

    name: ClassVar[str] = "circulant"
    scale: float = 1.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> CirculantPair:
        """Returns the zero circulant of the given shape."""
        return CirculantPair.init(key, shape, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Update):
    """LoRA (arXiv 2106.09685): `alpha / rank * A B^T`; A starts at 0, B at `N(0, 1 / in_features)`.

    >>> LoRA(rank=4).init(jax.random.key(0), (768, 768)).num_params
    6144
    """

    name: ClassVar[str] = "lora"
    rank: int = 1

    @property
    def factor(self) -> float:
        """The paper's `alpha / rank`, which keeps the size of the update as the rank grows."""
        return self.alpha / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Returns the zero matrix of the given shape as a product."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)


#: What each selection trains besides the modules that every method trains (the head): patterns of parameter paths.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "linear_probe": (),
    "full": (".*",),
}


def make_update(name: str, settings: dict[str, float]) -> Update:
    """Builds the registered update `name` with its settings.

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
