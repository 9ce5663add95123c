"""The interface of peft's file formats, which translate between our updates and the tensors in peft's files.

Weights and updates in peft have the shape (out, in): they are the transposes of our kernels and updates. If a setting
differs between layers, peft stores one common value and a dictionary of exceptions by module name.
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
"""The tensors of a layer, by the last parts of their names, such as "lora_A.weight"."""

Shapes = dict[str, tuple[int, ...]]
"""The shapes of a layer's tensors, by the same names as in `Arrays`."""


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """The update of a layer's kernel, `factor * matrix`.

    Attributes:
        path: The path of the layer.
        matrix: The matrix, of a family that the format can store.
        factor: The factor of the matrix.
    """

    path: str
    matrix: Any
    factor: float


FORMATS: dict[str, "Format"] = {}
"""The formats by `peft_type`. Importing a file of this folder registers the format that it defines."""


class Format(abc.ABC):
    """The file format of one `peft_type`.

    Attributes:
        peft_type: The name of the format in `adapter_config.json`.
        settings: The names of the settings that the format reads.
        mark: The prefix of a tensor's name after the name of its module, such as "lora_".
        description: The kind of updates that the format can store, for messages.
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
        """Return whether the format can store a matrix."""

    @abc.abstractmethod
    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings for updates, and the tensors of each update.

        Args:
            updates: The updates, by the names of their modules in peft. The format can store their matrices.

        Returns:
            The settings for `adapter_config.json`, and the tensors by module.
        """

    @abc.abstractmethod
    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Return our update for a module according to the settings, and the shapes that its tensors must have.

        Args:
            settings: The settings of the file.
            module: The name of the module in peft.
            shape: The (in_features, out_features) of the layer.

        Raises:
            UserError: If the value of a setting is not possible.
        """

    @abc.abstractmethod
    def read(self, arrays: Arrays) -> StructuredMatrix:
        """Return the matrix of a layer from its tensors, which have the shapes that `read_settings` returned."""


def tidy(value: float) -> float:
    """Return a number rounded to 13 significant digits, as an `int` if it is a whole number.

    >>> tidy(0.1 * 3), tidy(0.1 * 30)
    (0.3, 3)
    """
    value = float(f"{value:.13g}")
    return int(value) if value.is_integer() else value


def by_module(name: str, exceptions: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return settings that give each module its value: the most frequent value as common, the others as exceptions.

    >>> by_module("r", "rank_pattern", {"a": 4, "b": 4, "c": 8})
    {'r': 4, 'rank_pattern': {'c': 8}}
    """
    value, _ = collections.Counter(values.values()).most_common(1)[0]
    return {name: value, exceptions: {module: other for module, other in values.items() if other != value}}
