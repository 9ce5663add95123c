"""Methods that add nothing to a model. They train some of its existing parameters, together with the head."""

import dataclasses
from typing import ClassVar

from surm_jax.peft.methods.base import Method


class Selection(Method):
    """A method that trains existing parameters of the model.

    Attributes:
        patterns: Regular expressions for the paths of the parameters (`re.fullmatch`).
    """

    patterns: ClassVar[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Selection):
    """Train only the head."""

    name: ClassVar[str] = "linear_probe"
    patterns: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Selection):
    """Train all parameters (full fine-tuning)."""

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 5e-5
    patterns: ClassVar[tuple[str, ...]] = (".*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOnly(Selection):
    """Train all attention layers, as in "Three things everyone should know about ViTs" (arXiv 2203.09795)."""

    name: ClassVar[str] = "attention_only"
    learning_rate: ClassVar[float] = 5e-5
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?attention/.*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Selection):
    """Train all biases, including those of the LayerNorms (BitFit, arXiv 2106.10199)."""

    name: ClassVar[str] = "bitfit"
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?bias",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(Selection):
    """Train the scales and biases of all LayerNorms (arXiv 2302.08106)."""

    name: ClassVar[str] = "norm_tuning"
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?(\w+_)?norm\d*/(scale|bias)",)
