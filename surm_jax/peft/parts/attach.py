"""Putting updates and branches on modules in place, and taking them off: their classes change, their paths stay."""

import functools

from flax import nnx

from surm_jax.peft.parts.branch import Branch, Branched
from surm_jax.peft.parts.update import Adapted


def attach(module: nnx.Module, name: str, part: nnx.Module) -> None:
    """Adds an update or a branch to a module, in place, under the name of its adapter."""
    slot = "branch" if isinstance(part, Branch) else "delta"
    if not hasattr(module, slot):
        setattr(module, slot, nnx.Dict())
    getattr(module, slot)[name] = part
    _reclass(module)


def detach(module: nnx.Module, name: str) -> None:
    """Removes what an adapter added to a module, in place; without any additions left it is what it was."""
    for slot in ("delta", "branch"):
        if hasattr(module, slot) and name in getattr(module, slot):
            del getattr(module, slot)[name]
            if not len(getattr(module, slot)):
                delattr(module, slot)
    _reclass(module)


def original_class(module: nnx.Module) -> type[nnx.Module]:
    """Returns the class that a module had before anything was attached to it."""
    return getattr(type(module), "original_class", type(module))


def _reclass(module: nnx.Module) -> None:
    cls = original = original_class(module)
    if hasattr(module, "delta"):
        cls = _adapted_class(cls, original)
    if hasattr(module, "branch"):
        cls = _branched_class(cls, original)
    # Past nnx's own __setattr__, which would note `__class__` as one of the module's attributes.
    object.__setattr__(module, "__class__", cls)


@functools.cache
def _adapted_class(base: type[nnx.Module], original: type[nnx.Module]) -> type[Adapted]:
    root = nnx.LinearGeneral if issubclass(base, nnx.LinearGeneral) else nnx.Linear
    bases = (Adapted, base) if base is root else (base, _adapted_class(root, root))
    return _named(f"Adapted{base.__name__}", bases, original, f"{base.__name__} + delta.")


@functools.cache
def _branched_class(base: type[nnx.Module], original: type[nnx.Module]) -> type[Branched]:
    return _named(f"Branched{base.__name__}", (Branched, base), original, f"{base.__name__} + branch.")


def _named(name: str, bases: tuple[type, ...], original: type[nnx.Module], doc: str) -> type:
    return type(name, bases, {"original_class": original, "__doc__": doc})
