"""The interface of the file formats of peft, which convert between our updates and the tensors in peft's files.

Weights and updates in peft have the shape (out, in), the transpose of ours. If a setting differs between layers, peft
stores one value for most layers, and a dictionary with the values of the other modules by name.
"""

import abc
import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.methods.update import Update
from surm_jax.structured import StructuredMatrix

Arrays = dict[str, np.ndarray]
"""The tensors of a layer, by the part of their names after the module's name, such as "lora_A.weight"."""

Shapes = dict[str, tuple[int, ...]]
"""The shapes of a layer's tensors, by the same names as in `Arrays`."""


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """What an adapter adds to the kernel of one layer: `factor * matrix`.

    Attributes:
        path: The path of the layer in our model.
        matrix: The structured matrix.
        factor: The number that the matrix is multiplied by.
    """

    path: str
    matrix: Any
    factor: float


FORMATS: dict[str, "Format"] = {}
"""The file formats by `peft_type`. Defining a subclass of `Format` adds an instance of it."""


class Format(abc.ABC):
    """The file format of one `peft_type`. It converts our updates to tensors and settings, and back.

    Attributes:
        peft_type: The name of the format in `adapter_config.json`.
        settings: The names of the settings that the format reads.
        mark: What follows the module's name in the names of its tensors, such as "lora_" in "query.lora_A.weight".
        description: The kind of updates that the format can store, for error messages.
    """

    peft_type: ClassVar[str]
    settings: ClassVar[frozenset[str]]
    mark: ClassVar[str]
    description: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FORMATS[cls.peft_type] = cls()

    @abc.abstractmethod
    def holds(self, matrix: StructuredMatrix) -> bool:
        """Return whether the format can store an update with this matrix."""

    @abc.abstractmethod
    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings and the tensors that store the updates of all layers.

        Args:
            updates: The updates, by the name of the module in peft. `holds` must return True for the matrix of each.

        Returns:
            The settings for `adapter_config.json`, and the tensors of each module, by the module's name.
        """

    @abc.abstractmethod
    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Convert the settings of a module to our method, and return it with the shapes that the tensors must have.

        Args:
            settings: The settings in the folder's `adapter_config.json`.
            module: The name of the module in peft.
            shape: The shape of the layer's kernel as a matrix, (in_features, out_features).

        Raises:
            UserError: If a setting has a value that is not allowed.
        """

    @abc.abstractmethod
    def read(self, arrays: Arrays) -> StructuredMatrix:
        """Return the matrix that the tensors of a layer describe.

        The tensors must have the shapes that `read_settings` returned.
        """


def tidy(value: float) -> float:
    """Return a number rounded to 13 significant digits, as an `int` if the result is a whole number.

    This removes rounding errors, such as that of 0.1 * 3, which is 0.30000000000000004:

    >>> tidy(0.1 * 3), tidy(0.1 * 30)
    (0.3, 3)
    """
    value = float(f"{value:.13g}")
    return int(value) if value.is_integer() else value


def by_module(name: str, exceptions: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return two settings of peft that together give each module its value.

    The setting `name` holds the most frequent value, and `exceptions` those of the other modules:

    >>> by_module("r", "rank_pattern", {"a": 4, "b": 4, "c": 8})
    {'r': 4, 'rank_pattern': {'c': 8}}
    """
    value, _ = collections.Counter(values.values()).most_common(1)[0]
    return {name: value, exceptions: {module: other for module, other in values.items() if other != value}}
