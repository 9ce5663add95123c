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
        theirs: the last part of its name there, such as "weight".
        read: their layout to ours, `(array, shape of our parameter) -> array`.
        write: our layout to theirs.
    """

    theirs: str
    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


class ModuleNames(Protocol):
    """The names that transformers has for one of our models: `surm_jax.pretrained.hf.architecture.Names` is one."""

    def modules(self, path: str) -> tuple[str, ...]:
        """Returns the names of the module at a path, that in memory first; none where it has no name."""

    def tensor(self, path: str) -> tuple[str, Layout]:
        """Returns the name in a checkpoint of the array at a parameter path, and its layouts."""


def whole_modules(
    parameters: Mapping[str, nnx.Param], names: ModuleNames
) -> dict[str, dict[str, tuple[nnx.Param, Layout]]]:
    """Returns the modules that peft can train as a whole: their paths, and their parameters by the names there.

    These are the modules with a name whose parameters are all their own: of one with modules inside, its own parameters
    alone would be a part.

    Args:
        parameters: those of the model by path.
        names: what transformers calls them.
    """
    paths = {path: path.rpartition("/")[0] for path in parameters}
    outer = {module[:end] for module in paths.values() for end, char in enumerate(module) if char == "/"}
    found: dict[str, dict[str, tuple[nnx.Param, Layout]]] = {}
    for path, module in paths.items():
        if module not in outer and names.modules(module):
            layout = names.tensor(path)[1]
            found.setdefault(module, {})[layout.theirs] = (parameters[path], layout)
    return found
