"""The names that Hugging Face's transformers gives to the modules and arrays of a model, as adapters need them."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from flax import nnx

ROOT = "base_model.model."
"""The prefix of every tensor name in peft's files."""


class Layout(Protocol):
    """The name and layout of one array in transformers, and how to convert it from and to our layout."""

    @property
    def theirs(self) -> str:
        """The last part of the array's name in transformers, such as "weight"."""

    @property
    def read(self) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
        """The function from their layout to ours, `(array, shape of our parameter) -> array`."""

    @property
    def write(self) -> Callable[[np.ndarray], np.ndarray]:
        """The function from our layout to theirs, `array -> array`."""


class ModuleNames(Protocol):
    """The names that transformers uses for one of our models, such as `surm_jax.pretrained.hf.architecture.Names`."""

    def modules(self, path: str) -> tuple[str, ...]:
        """Return the names of the module at a path, first the one in memory; an empty tuple if it has no name."""

    def tensor(self, path: str) -> tuple[str, Layout]:
        """Return the checkpoint name of the array at a parameter path, and its layouts."""


def whole_modules(
    parameters: Mapping[str, nnx.Param], names: ModuleNames
) -> dict[str, dict[str, tuple[nnx.Param, Layout]]]:
    """Return the modules that peft can train as a whole, by path, and their parameters by their names in transformers.

    These are the modules that have a name in transformers and contain no other modules with parameters.

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
