"""What an adapter is made of: rules that say which modules get which method, and what is trained besides."""

import dataclasses
import functools
import itertools
import re
from typing import Any

from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import compile_pattern, join
from surm_jax.peft.methods.base import Bottleneck, Method, Update, make_method
from surm_jax.peft.parts.variables import AdapterParam

DEFAULT_NAME = "default"
SLOTS = ("delta", "branch")
"""Where in a module the parts of adapters are: `<module>/<slot>/<name of the adapter>/...`."""

_MOST_PARTS, _MOST_PATTERNS = 64, 1000


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""Gives the modules whose path `target` matches as a whole a method, or keeps later rules from them.

    >>> from surm_jax.peft.methods import LoRA
    >>> Rule(r"blocks/\d+/attention/(query|value)", LoRA(rank=4)).method.rank
    4

    Attributes:
        target: a regular expression for module paths (`re.fullmatch`), or for `adapt` the name of one in the model's
            `adapter_targets`.
        method: an `Update` for linear layers, a `Bottleneck` for modules; `None`: these modules get nothing.
        parts: an update may see the kernel as so many equal blocks of output features, as a fused qkv kernel has three.
        which: the numbers of the blocks that it updates, from 0 on; empty: all.
    """

    target: str
    method: Method | None
    parts: int = 1
    which: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        compile_pattern(self.target)
        if not (self.method is None or isinstance(self.method, Update | Bottleneck)):
            raise UserError(
                f"the method of the rule {self.target!r} must be an update such as LoRA(), a bottleneck or None,"
                f" got {self.method!r}"
            )
        if isinstance(self.which, list | range):
            object.__setattr__(self, "which", tuple(self.which))
        if not isinstance(self.which, tuple) or not all(type(number) is int for number in (self.parts, *self.which)):
            raise UserError(
                f"the rule {self.target!r} must have whole numbers in `parts` and `which`, got parts={self.parts!r},"
                f" which={self.which!r}"
            )
        if self.parts == 1 and not self.which:
            return
        if not isinstance(self.method, Update):
            raise UserError(f"the rule {self.target!r} has parts, but only updates of kernels have parts")
        if self.parts > _MOST_PARTS:
            raise UserError(f"the rule {self.target!r} must have at most {_MOST_PARTS} parts, got {self.parts}")
        if self.parts < 1 or len({*self.which}) < len(self.which) or not {*self.which} <= {*range(self.parts)}:
            raise UserError(
                f"the rule {self.target!r} must have different numbers from 0 to {self.parts - 1} in `which`, as many"
                f" as it says `parts`, got parts={self.parts}, which={self.which}"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the rule as JSON values."""
        method = self.method
        return {
            "target": self.target,
            "method": method and method.name,
            "settings": dataclasses.asdict(method) if method else {},
            "parts": self.parts,
            "which": list(self.which),
        }

    @classmethod
    def from_json(cls, rule: dict[str, Any]) -> "Rule":
        """Reads what `to_json` wrote."""
        method = None if rule["method"] is None else make_method(rule["method"], rule["settings"])
        return cls(rule["target"], method, rule["parts"], tuple(rule["which"]))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The recipe of an adapter; with an adapted model at hand, everything needed to train, save and load it.

    Attributes:
        rules: of the rules that match a module the first counts.
        train: patterns of the paths of parameters that are trained besides, such as `head/.*`.
        name: tells it from other adapters of the same model.
    """

    rules: tuple[Rule, ...]
    train: tuple[str, ...] = ()
    name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        if (count := len(self.rules) + len(self.train)) > _MOST_PATTERNS:
            raise UserError(f"an adapter has at most {_MOST_PATTERNS} rules and patterns, got {count:,}")
        for pattern in self.train:
            compile_pattern(pattern)
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"the name of an adapter has letters, digits, _ and -, got {self.name!r}")
        if hasattr(nnx.Dict, self.name):  # It would hide that method of where the adapters of a module are.
            raise UserError(f"an adapter cannot be called {self.name!r}, as a method of nnx.Dict")
        if self.name in SLOTS:  # `adapter_of` could not tell it from the slot, and nothing of it would be trained
            raise UserError(f"an adapter cannot be called {self.name!r}, as the part of a module where adapters are")

    @functools.cached_property
    def trainable(self) -> nnx.filterlib.Predicate:
        """The one NNX filter of what is trained: parameters that this adapter brought, and `train`.

        >>> model = nnx.Dict(body=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), head=nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
        >>> graphdef, trainable, frozen = nnx.split(model, Adapter((), ("head/.*",)).trainable, ...)
        >>> [join(path) for path, _ in nnx.to_flat_state(trainable)]
        ['head/bias', 'head/kernel']
        """
        patterns = [compile_pattern(pattern) for pattern in self.train]

        def is_trainable(path: tuple[Any, ...], variable: Any) -> bool:
            kind = getattr(variable, "type", type(variable))
            if issubclass(kind, AdapterParam):
                return adapter_of(path) == self.name
            return issubclass(kind, nnx.Param) and any(pattern.matches(join(path)) for pattern in patterns)

        return is_trainable

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as JSON values. The name is not part of it: whoever loads it chooses one."""
        return {"rules": [rule.to_json() for rule in self.rules], "train": list(self.train)}

    @classmethod
    def from_json(cls, recipe: dict[str, Any], name: str = DEFAULT_NAME) -> "Adapter":
        """Reads what `to_json` wrote.

        Raises:
            UserError: if it is something else.
        """
        try:
            return cls(tuple(map(Rule.from_json, recipe["rules"])), tuple(recipe["train"]), name)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not the recipe of an adapter ({type(error).__name__}: {error})") from None


def adapter_of(path: tuple[Any, ...]) -> str | None:
    """Returns the name of the adapter that a variable at an NNX path belongs to, or `None`.

    >>> adapter_of(("blocks", 0, "query", "delta", "default", "r1"))
    'default'
    """
    for name, slot in itertools.pairwise(reversed(path)):  # from the end: the model may have such names itself
        if slot in SLOTS:
            return name
    return None
