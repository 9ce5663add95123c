"""The recipe of an adapter: rules that assign methods to modules, and patterns for other trained parameters."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import compile_pattern, join
from surm_jax.peft.kernels.parameter import check_axes
from surm_jax.peft.methods.base import PartMethod, make_method
from surm_jax.peft.parts.base import SLOTS, AdapterParam, adapter_of

DEFAULT_NAME = "default"
"""The name of an adapter that was given none."""


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""A method, and a pattern for the paths of the modules to which an adapter applies it.

    If several rules of an adapter match a module, the first one applies and the others are ignored. The rule in this
    example assigns LoRA of rank 4 to the query and value layers of all blocks:

    >>> from surm_jax.peft import LoRA
    >>> Rule(r"blocks/\d+/attention/(query|value)", LoRA(rank=4)).method.rank
    4

    Attributes:
        target: A regular expression for whole module paths (`re.fullmatch`). For `adapt` it may also be the name of a
            preset in the model's `adapter_targets`.
        method: A method that adds a part to each module, such as an `Update` or a `Branch`. With `None`, the adapter
            adds nothing to these modules, even if later rules match them.
        parts: The number of equal blocks into which the output features of a packed kernel are divided, such as 3 for
            a kernel that holds query, key and value.
        which: The indices of the blocks that get an update, counted from 0. An empty tuple means all blocks.
        axes: How a parameter is a matrix, if `target` is the path of a parameter: a letter for each of its axes in one
            layer, `i` for rows, `o` for columns, `b` for a batch with one matrix for each entry, such as "bio" for the
            experts of a mixture. A parameter of two axes needs no letters.
    """

    target: str
    method: PartMethod | None
    parts: int = 1
    which: tuple[int, ...] = ()
    axes: str = ""

    def __post_init__(self) -> None:
        compile_pattern(self.target)
        if not (self.method is None or isinstance(self.method, PartMethod)):
            raise UserError(
                f"the method of the rule {self.target!r} must be an update such as LoRA(), a branch or None,"
                f" got {self.method!r}"
            )
        if isinstance(self.which, list | range):
            object.__setattr__(self, "which", tuple(self.which))
        if not isinstance(self.which, tuple) or not all(type(number) is int for number in (self.parts, *self.which)):
            raise UserError(
                f"the rule {self.target!r} must have whole numbers in `parts` and `which`, got parts={self.parts!r},"
                f" which={self.which!r}"
            )
        if self.axes:
            check_axes(self.axes, f"the rule {self.target!r}")
        if self.parts == 1 and not self.which:
            return
        if not (self.method and self.method.takes_packed):
            what = f"not {self.method.name}" if self.method else "and it has no method"
            raise UserError(f"the rule {self.target!r} has parts, but only updates of kernels have parts, {what}")
        differ = len({*self.which}) == len(self.which)
        if self.parts < 1 or not differ or not all(0 <= number < self.parts for number in self.which):
            raise UserError(
                f"the rule {self.target!r} must have parts >= 1, and different numbers from 0 to parts - 1 in `which`,"
                f" got parts={self.parts}, which={self.which}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the rule as a dictionary of values that JSON can represent."""
        method = self.method
        return {
            "target": self.target,
            "method": method and method.name,
            "settings": dataclasses.asdict(method) if method else {},
            "parts": self.parts,
            "which": list(self.which),
            **({"axes": self.axes} if self.axes else {}),
        }

    @classmethod
    def from_json(cls, rule: dict[str, Any]) -> "Rule":
        """Return the rule for a dictionary that `to_json` made."""
        method = None if rule["method"] is None else make_method(rule["method"], rule["settings"])
        axes = rule.get("axes", "")
        return cls(rule["target"], method, rule["parts"], tuple(rule["which"]), axes)  # type: ignore[arg-type]  # Rule checks


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The recipe of an adapter. Training and saving need only this recipe and the adapted model.

    Functions that only look up an adapter's parts in a model take an `Adapter` or its name. Functions that also need
    the rules or the trained parameters take an `Adapter`.

    Attributes:
        rules: The rules. The first rule that matches a module applies.
        train: Regular expressions for the paths of parameters of the base model that are also trained, such as
            `head/.*`.
        name: The adapter's name, which distinguishes it from other adapters in the same model.
        base: A dictionary from the path of each frozen variable of the base model to a sum over its bits when the
            adapter was added (`checksums`). `None` means that the sums are not known. They are not saved.
    """

    rules: tuple[Rule, ...]
    train: tuple[str, ...] = ()
    name: str = DEFAULT_NAME
    base: Mapping[str, str] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for pattern in self.train:
            compile_pattern(pattern)
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"the name of an adapter may have only letters, digits, _ and -, got {self.name!r}")
        if hasattr(nnx.Dict, self.name):  # A part is an attribute of an `nnx.Dict`. It would hide this method.
            raise UserError(f"an adapter cannot be called {self.name!r}: nnx.Dict has a method of this name")
        if self.name in SLOTS:  # `adapter_of` would mistake the name for a slot: nothing would be trained.
            raise UserError(f"an adapter cannot be called {self.name!r}: a slot for parts in modules has this name")

    @functools.cached_property
    def trainable(self) -> nnx.filterlib.Predicate:
        """The NNX filter that selects all variables that the adapter trains.

        They are the parameters of its parts, and those with paths that match `train`. The model in this example has no
        parts, so that only the head is selected:

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
        """Return the recipe as a dictionary of values that JSON can represent.

        The dictionary does not contain the name, which is chosen when the adapter is loaded.
        """
        return {"rules": [rule.to_json() for rule in self.rules], "train": list(self.train)}

    @classmethod
    def from_json(cls, recipe: dict[str, Any], name: str = DEFAULT_NAME) -> "Adapter":
        """Return the adapter for a dictionary that `to_json` made, under a given name.

        Raises:
            UserError: If `recipe` is not such a dictionary.
        """
        try:
            return cls(tuple(map(Rule.from_json, recipe["rules"])), tuple(recipe["train"]), name)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not the recipe of an adapter ({type(error).__name__}: {error})") from None
