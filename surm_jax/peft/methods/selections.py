"""Methods that add nothing to the model and train a part of what is there, besides the head."""

import dataclasses
from typing import ClassVar

from surm_jax.peft.methods.base import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Selection):
    """The head alone."""

    name: ClassVar[str] = "linear_probe"
    patterns: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Selection):
    """Full fine-tuning."""

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 5e-5
    patterns: ClassVar[tuple[str, ...]] = (".*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOnly(Selection):
    """The attention layers whole, as in "Three things everyone should know about ViTs" (arXiv 2203.09795)."""

    name: ClassVar[str] = "attention_only"
    learning_rate: ClassVar[float] = 5e-5
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?attention/.*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Selection):
    """All biases, those of the norms included (arXiv 2106.10199)."""

    name: ClassVar[str] = "bitfit"
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?bias",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(Selection):
    """Scales and biases of all LayerNorms (arXiv 2302.08106)."""

    name: ClassVar[str] = "norm_tuning"
    patterns: ClassVar[tuple[str, ...]] = (r"(.*/)?(\w+_)?norm\d*/(scale|bias)",)
