"""What a method is, and the registry of methods by name.

A `PartMethod` puts a part into modules: `Update` and `Branch` are the two kinds here, and others can be defined beside
them. A `Selection` puts nothing into the model and trains parameters that exist. A new method is one class in one file:
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
"""Every registered method, by its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A method with its settings, which are numbers, booleans or names. A subclass with a `name` is registered.

    Attributes:
        name: The method's name in configurations and files.
        target: The preset of targets in a model that the method is meant for, such as "qkv".
        learning_rate: A peak for Adam from which a search can start; tasks differ.
    """

    name: ClassVar[str]
    target: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls) and not hasattr(cls, "name"):
            return  # a base class of methods
        if "name" not in vars(cls) or cls.name in METHODS:
            raise UserError(f"{cls.__name__} needs a name of its own: {cls.name!r} is {METHODS[cls.name].__name__}")
        METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_setting(self.name, field, value, may_be_zero=self._may_be_zero(field.name))

    def _may_be_zero(self, name: str) -> bool:
        """Say whether a numeric setting may be 0 although its field does not declare it."""
        del name
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartMethod(Method):
    """A method that puts a part into modules.

    Attributes:
        part: The class of the parts; its `slot` says which modules can have one.
        takes_packed: Whether a rule may say that the kernel is packed, of `parts` equal blocks of features.
    """

    part: ClassVar[type[Part]]
    takes_packed: ClassVar[bool] = False

    @abc.abstractmethod
    def make_part(self, place: Place, key: jax.Array) -> Part:
        """Return the part of one module at the start of training, when it must add exactly zero.

        Args:
            place: The module's width, and its kernel where the part is in the kernel slot.
            key: A key for the random numbers of this part.

        Raises:
            UserError: If the method's settings do not fit the place.
        """

    def choose(self, paths: list[str]) -> list[str]:
        """Return those of a rule's modules, given by path, that get a part; at least one.

        Raises:
            UserError: If the method's settings leave none.
        """
        return paths


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """Build the registered method `name` with its settings.

    >>> from surm_jax.peft import make_method
    >>> make_method("lora", {"rank": 2}).rank
    2

    Raises:
        UserError: For an unknown name or setting, or a value that is not possible; the message names the nearest one.
    """
    if name not in METHODS:
        raise UserError(f"no method is called {name!r}{did_you_mean(name, METHODS)} (known: {', '.join(METHODS)})")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for key in settings:
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")
    return METHODS[name](**settings)
