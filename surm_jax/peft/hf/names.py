"""What transformers calls the modules and arrays of a model, as far as an adapter must know."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from flax import nnx

ROOT = "base_model.model."
"""What the names of all tensors in peft's files begin with."""


class Layout(Protocol):
    """One array of a module in both layouts.

    Attributes:
        theirs: The last part of its name there, such as "weight".
        read: Their layout to ours, `(array, shape of our parameter) -> array`.
        write: Our layout to theirs.
    """

    theirs: str
    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


class ModuleNames(Protocol):
    """The names that transformers has for one of our models: `surm_jax.pretrained.hf.architecture.Names` is one."""

    def modules(self, path: str) -> tuple[str, ...]:
        """Return the names of the module at a path, the one in memory first; empty if it has no name."""

    def tensor(self, path: str) -> tuple[str, Layout]:
        """Return the name in a checkpoint of the array at a parameter path, and its layouts."""


def whole_modules(
    parameters: Mapping[str, nnx.Param], names: ModuleNames
) -> dict[str, dict[str, tuple[nnx.Param, Layout]]]:
    """Return the modules that peft can train as a whole: their paths, and their parameters by the names there.

    These are the modules with a name and without modules inside them.

    Args:
        parameters: The parameters of the model, by path.
        names: The names of the modules in transformers.
    """
    paths = {path: path.rpartition("/")[0] for path in parameters}
    outer = {module[:end] for module in paths.values() for end, char in enumerate(module) if char == "/"}
    found: dict[str, dict[str, tuple[nnx.Param, Layout]]] = {}
    for path, module in paths.items():
        if module not in outer and names.modules(module):
            layout = names.tensor(path)[1]
            found.setdefault(module, {})[layout.theirs] = (parameters[path], layout)
    return found
