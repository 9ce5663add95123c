"""The base classes of methods, and the registry of methods by name.

A `PartMethod` adds parts to modules. This package has two kinds, `Update` and `Branch`, and users can define others. A
`Selection` adds nothing to the model: it trains existing parameters. A new method is one class in one file, and
importing the file registers it.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax

from surm_jax.errors import UserError, did_you_mean
from surm_jax.peft.methods.settings import check_setting
from surm_jax.peft.parts.base import Part, Place

METHODS: dict[str, type["Method"]] = {}
"""A dictionary from the name of each registered method to its class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A fine-tuning method with its settings, which are numbers, booleans or names.

    A subclass that defines `name` is registered in `METHODS` under this name.

    Attributes:
        name: The method's name in configurations and files.
        target: The preset in `surm_jax.models.TARGETS` for the modules that the method is meant for, such as "qkv".
        learning_rate: A peak learning rate for Adam from which a search can start. The best one depends on the task.
    """

    name: ClassVar[str]
    target: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls) and not hasattr(cls, "name"):
            return  # This is a base class of methods, which is not registered.
        if "name" not in vars(cls) or cls.name in METHODS:
            raise UserError(f"{cls.__name__} needs a name of its own: {cls.name!r} is {METHODS[cls.name].__name__}")
        METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_setting(self.name, field, value, may_be_zero=self._may_be_zero(field.name))

    def _may_be_zero(self, name: str) -> bool:
        """Return whether a numeric setting may be 0, even if the limits of its field exclude 0."""
        del name
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartMethod(Method):
    """A method that adds a part to each module that a rule matches.

    Attributes:
        part: The class of the parts. Its `slot` determines which modules can have such a part.
        takes_packed: Whether a rule may use `parts` and `which` to select blocks of a packed kernel.
    """

    part: ClassVar[type[Part]]
    takes_packed: ClassVar[bool] = False

    @abc.abstractmethod
    def make_part(self, place: Place, key: jax.Array) -> Part:
        """Return the part for one module. At first, it must add exactly zero to the module's output.

        Args:
            place: What the method needs to know of the module, such as its output width and its kernel.
            key: The JAX key for the initial random numbers.

        Raises:
            UserError: If the method's settings do not fit the module.
        """

    def choose(self, paths: list[str]) -> list[str]:
        """Return the paths of the modules that get a part. By default, every module that the rule matches gets one.

        Args:
            paths: The paths of the modules that the rule matches. At least one of them must be returned.

        Raises:
            UserError: If the method's settings exclude all of the modules.
        """
        return paths


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """Return an instance of the method that is registered as `name`, with the given settings.

    >>> from surm_jax.peft import make_method
    >>> make_method("lora", {"rank": 2}).rank
    2

    Raises:
        UserError: If the name or a setting is unknown (the message suggests the nearest one), or if the value of a
            setting is not allowed.
    """
    if name not in METHODS:
        raise UserError(f"no method is called {name!r}{did_you_mean(name, METHODS)} (known: {', '.join(METHODS)})")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for key in settings:
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
    return METHODS[name](**settings)
