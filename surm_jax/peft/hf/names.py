"""The interface for the names that Hugging Face's transformers gives to the modules and arrays of our models.

Folders of peft use these names.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from flax import nnx

ROOT = "base_model.model."
"""The prefix of every tensor name in peft's files."""


class Layout(Protocol):
    """One array of a module: its name in transformers, and functions that convert its layout there to ours and back."""

    @property
    def theirs(self) -> str:
        """The last part of the array's name in transformers, such as "weight"."""

    @property
    def read(self) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
        """The function that converts the layout in transformers to ours, `(array, shape of our parameter) -> array`."""

    @property
    def write(self) -> Callable[[np.ndarray], np.ndarray]:
        """The function that converts our layout to that in transformers, `array -> array`."""


class ModuleNames(Protocol):
    """The names that transformers gives to the modules and arrays of one of our models.

    `surm_jax.pretrained.hf.architecture.Names` implements this interface.
    """

    def modules(self, path: str) -> tuple[str, ...]:
        """Return the names that transformers gives to the module at a path.

        The first name is the attribute path of the module in a loaded transformers model. Any other names are those in
        earlier versions. The result is an empty tuple if transformers has no such module.
        """

    def tensor(self, path: str) -> tuple[str, Layout]:
        """Return the full name in checkpoints of the parameter at a path, and the `Layout` that converts its array."""


def whole_modules(
    parameters: Mapping[str, nnx.Param], names: ModuleNames
) -> dict[str, dict[str, tuple[nnx.Param, Layout]]]:
    """Return the modules that peft can train as a whole, with their parameters.

    These are the modules that have a name in transformers and contain no other modules with parameters.

    Args:
        parameters: The parameters of the model, by path.
        names: The names that transformers gives to the modules of the model.

    Returns:
        A dictionary that maps the path of each such module to a second dictionary. The second dictionary maps the last
        part of an array's name in transformers, such as "weight", to our parameter and its `Layout`.
    """
    paths = {path: path.rpartition("/")[0] for path in parameters}
    outer = {module[:end] for module in paths.values() for end, char in enumerate(module) if char == "/"}
    found: dict[str, dict[str, tuple[nnx.Param, Layout]]] = {}
    for path, module in paths.items():
        if module not in outer and names.modules(module):
            layout = names.tensor(path)[1]
            found.setdefault(module, {})[layout.theirs] = (parameters[path], layout)
    return found
