"""What an adapter is made of: rules that say which layers get which update, and what is trained besides."""

import dataclasses
import functools
from typing import Any

from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import compile_pattern, join
from surm_jax.peft.delta import AdapterParam
from surm_jax.peft.methods import Update, make_update


@dataclasses.dataclass(frozen=True)
class Rule:
    """Gives the linear layers whose path `target` matches as a whole an update.

    >>> from surm_jax.peft.methods import LoRA
    >>> Rule(r"blocks/\\d+/attention/(query|value)", LoRA(rank=4)).update.rank
    4

    Attributes:
      target: a regular expression for module paths (`re.fullmatch`).
      update: the update that these layers get.
    """

    target: str
    update: Update

    def __post_init__(self):
        compile_pattern(self.target)
        if not isinstance(self.update, Update):
            raise UserError(
                f"the update of the rule {self.target!r} must be an Update such as LoRA(), got {self.update!r}"
            )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The recipe of an adapter; with an adapted model at hand, everything needed to train, save and load it.

    Attributes:
      rules: of the rules that match a layer the first counts.
      train: patterns of the paths of parameters that are trained besides the updates, such as `head/.*`.
    """

    rules: tuple[Rule, ...]
    train: tuple[str, ...] = ()

    def __post_init__(self):
        for pattern in self.train:
            compile_pattern(pattern)

    @functools.cached_property
    def trainable(self) -> nnx.filterlib.Predicate:
        """The one NNX filter of what is trained: parameters of updates, and `train`.

        >>> model = nnx.Dict(body=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), head=nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
        >>> graphdef, trainable, frozen = nnx.split(model, Adapter((), ("head/.*",)).trainable, ...)
        >>> [join(path) for path, _ in nnx.to_flat_state(trainable)]
        ['head/bias', 'head/kernel']
        """
        patterns = [compile_pattern(pattern) for pattern in self.train]

        def is_trainable(path: tuple[Any, ...], variable: Any) -> bool:
            kind = getattr(variable, "type", type(variable))
            if issubclass(kind, AdapterParam):
                return True
            return issubclass(kind, nnx.Param) and any(pattern.fullmatch(join(path)) for pattern in patterns)

        return is_trainable

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as JSON values."""
        return {
            "rules": [
                {"target": rule.target, "method": rule.update.name, "settings": dataclasses.asdict(rule.update)}
                for rule in self.rules
            ],
            "train": list(self.train),
        }

    @classmethod
    def from_json(cls, recipe: dict[str, Any]) -> "Adapter":
        """Reads what `to_json` wrote.

        Raises:
          UserError: if it is something else.
        """
        try:
            rules = tuple(
                Rule(rule["target"], make_update(rule["method"], rule["settings"])) for rule in recipe["rules"]
            )
            return cls(rules, tuple(recipe["train"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not the recipe of an adapter ({type(error).__name__}: {error})") from None
