"""The methods that put nothing into a model and train parameters that exist, together with the head."""

import dataclasses
from typing import ClassVar

from surm_jax.peft.methods.base import Method


class Selection(Method):
    """A method that trains parameters of the model itself.

    Attributes:
        patterns: Regular expressions for the paths of the parameters (`re.fullmatch`).
    """

    patterns: ClassVar[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Selection):
    """Training of the head only."""

    name: ClassVar[str] = "linear_probe"
    patterns: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Selection):
    """Full fine-tuning: training of all parameters."""

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 5e-5
    patterns: ClassVar[tuple[str, ...]] = (".*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOnly(Selection):
    """Training of all attention layers, as in "Three things everyone should know about ViTs" (arXiv 2203.09795)."""

    name: ClassVar[str] = "attention_only"
    learning_rate: ClassVar[float] = 5e-5
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?attention/.*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Selection):
    """Training of all biases, including those of the norms (BitFit, arXiv 2106.10199)."""

    name: ClassVar[str] = "bitfit"
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?bias",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(Selection):
    """Training of the scales and biases of all LayerNorms (arXiv 2302.08106)."""

    name: ClassVar[str] = "norm_tuning"
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?(\w+_)?norm\d*/(scale|bias)",)
