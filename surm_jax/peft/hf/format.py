"""What a format of Hugging Face's peft is: how it stores the updates of layers, and what they are here.

A weight there is (out, in), the transpose of a kernel here, and so are updates. A setting that differs between layers
has exceptions there, by the names of the modules.
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
"""The tensors of a layer by the last parts of their names, such as "lora_A.weight"."""

Shapes = dict[str, tuple[int, ...]]
"""Their shapes."""


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """What an adapted layer adds to its kernel: `factor * matrix`.

    Attributes:
        path: Path of the layer.
        matrix: The matrix, of a family that the format holds.
        factor: The factor of the matrix.
    """

    path: str
    matrix: Any
    factor: float


FORMATS: dict[str, "Format"] = {}
"""The formats by `peft_type`. Importing a file of this folder registers the format in it."""


class Format(abc.ABC):
    """One `peft_type`: how updates are stored in the files of Hugging Face's peft.

    Attributes:
        peft_type: The name of the format in `adapter_config.json`.
        settings: The settings that are read.
        mark: What the last parts of its tensors' names begin with.
        description: Which updates it holds, for messages.
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
        """Say whether the format has a place for a matrix."""

    @abc.abstractmethod
    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings for updates that the format holds, and their tensors, both by module."""

    @abc.abstractmethod
    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Return what the settings say of a module.

        Args:
            settings: Those of the file.
            module: The name of the module there.
            shape: (in_features, out_features) of the layer.

        Returns:
            Our update, and the shapes that the tensors must have.

        Raises:
            UserError: If a setting is not possible.
        """

    @abc.abstractmethod
    def read(self, arrays: Arrays) -> StructuredMatrix:
        """Return the matrix of a layer whose tensors have these shapes."""


def tidy(value: float) -> float:
    """Return a number without the rounding in its last digits, as a whole number if it is one.

    >>> tidy(0.1 * 3), tidy(0.1 * 30)
    (0.3, 3)
    """
    value = float(f"{value:.13g}")
    return int(value) if value.is_integer() else value


def by_module(name: str, exceptions: str, values: Mapping[str, float]) -> dict[str, Any]:
    """Return the most frequent of the modules' values as one setting, and the other values as its exceptions.

    >>> by_module("r", "rank_pattern", {"a": 4, "b": 4, "c": 8})
    {'r': 4, 'rank_pattern': {'c': 8}}
    """
    value, _ = collections.Counter(values.values()).most_common(1)[0]
    return {name: value, exceptions: {module: other for module, other in values.items() if other != value}}
