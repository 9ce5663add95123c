"""Attaching parts to modules, which changes a module's class but not the paths of its parameters.

The parameters of an adapted module keep their paths (`.../kernel`, `.../bias`), and those of its parts get new ones
(`.../delta/<adapter>/r1`, ...). Checkpoints, sharding rules and path patterns for the module therefore stay valid. The
new class is a subclass of the old one, so `isinstance(layer, nnx.Linear)` stays true. All attributes stay as well.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array

from surm_jax.peft.kernels import KINDS
from surm_jax.peft.kernels.parameter import AdaptedParameters
from surm_jax.peft.kernels.quantised import own_products, own_products_only
from surm_jax.peft.parts.base import KERNEL, OUTPUT, SLOTS, OutputPart, Part, original_class


class BranchedModule(nnx.Module):
    """The mixin class for modules with output parts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Return the module's output plus what its output parts add, each computed from the output itself."""
        # `super()` is the module's own class, which comes after this one among the bases.
        y = super().__call__(*args, **kwargs)  # type: ignore[misc]
        parts: list[OutputPart] = _parts(vars(self)[OUTPUT])
        own_products_only(self)  # This raises an error if qwix quantises the adapted model.
        with own_products():
            return sum((part.added(y) for part in parts), start=y)


def attach(module: nnx.Module, name: str, part: Part) -> None:
    """Add a part to a module, in place, under the name of its adapter."""
    if not hasattr(module, part.slot):
        setattr(module, part.slot, nnx.Dict())
    slot = getattr(module, part.slot)
    if part.parameter:
        if name not in slot:
            slot[name] = nnx.Dict()
        slot[name][part.parameter] = part
    else:
        slot[name] = part
    _reclass(module)


def detach(module: nnx.Module, name: str) -> None:
    """Remove an adapter's parts from a module, in place. A module without parts gets back its original class."""
    for slot in SLOTS:
        if name in vars(module).get(slot, {}):
            del getattr(module, slot)[name]
            if not len(getattr(module, slot)):
                delattr(module, slot)
    _reclass(module)


def _reclass(module: nnx.Module) -> None:
    cls = original = original_class(module)
    entries = list(vars(vars(module)[KERNEL]).values()) if KERNEL in vars(module) else []
    if any(isinstance(entry, Part) for entry in entries):
        cls = _adapted_class(cls, original)
    if any(isinstance(entry, nnx.Dict) for entry in entries):
        cls = _made(
            f"Adapted{cls.__name__}", (AdaptedParameters, cls), original, f"{cls.__name__} with adapted parameters."
        )
    if hasattr(module, OUTPUT):
        cls = _branched_class(cls, original)
    # Bypass nnx's own `__setattr__`, which would record `__class__` as an attribute of the module.
    object.__setattr__(module, "__class__", cls)


def _adapted_class(base: type[nnx.Module], original: type[nnx.Module]) -> type[nnx.Module]:
    root = next(cls for cls in base.__mro__ if cls in KINDS)
    bases = (KINDS[root].mixin, base) if base is root else (base, _adapted_class(root, root))
    return _made(f"Adapted{base.__name__}", bases, original, f"{base.__name__} with kernel parts.")


def _branched_class(base: type[nnx.Module], original: type[nnx.Module]) -> type[nnx.Module]:
    return _made(f"Branched{base.__name__}", (BranchedModule, base), original, f"{base.__name__} with output parts.")


class _Made(type(nnx.Module)):  # type: ignore[misc]  # a metaclass that Flax does not export
    """The metaclass of the classes that `attach` makes at run time. There is exactly one class for the same bases.

    Pickle stores such a class as the arguments of `_made`, and cloudpickle as a call of this metaclass. In any process
    and thread, both give the class that `attach` uses there.
    """

    known: ClassVar[dict[tuple[type, ...], type]] = {}

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        if bases not in cls.known:  # Another thread may make the same class now: all take the first one.
            cls.known.setdefault(bases, super().__new__(cls, name, bases, namespace))
        return cls.known[bases]


def _made(name: str, bases: tuple[type, ...], original: type[nnx.Module], doc: str) -> type[nnx.Module]:
    made = _metaclass(type(original))  # type: ignore[arg-type]  # mypy takes a metaclass for unhashable
    return made(name, bases, {"original_class": original, "__doc__": doc, "__module__": __name__})


@functools.cache
def _metaclass(of: type[type]) -> type[_Made]:
    """Return a metaclass that derives from `_Made` and from the metaclass `of`, which a user may have written."""
    found = _Made if issubclass(_Made, of) else type(f"_Made{of.__name__}", (_Made, of), {})
    copyreg.pickle(found, _arguments)
    return found


def _arguments(cls: Any) -> tuple[Callable[..., type], tuple[Any, ...]]:
    return _made, (cls.__name__, cls.__bases__, cls.original_class, cls.__doc__)


def _parts(slot: nnx.Dict) -> list[Any]:
    # `nnx.tabulate` replaces `nnx.Dict.values` by a compiled function, and sets another attribute.
    return [part for part in vars(slot).values() if isinstance(part, Part)]
