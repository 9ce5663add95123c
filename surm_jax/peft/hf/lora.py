"""The file format of LoRA adapters in peft."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from surm_jax.peft.hf.format import Arrays, Format, LayerUpdate, Shapes, by_module, tidy
from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.methods.lora import LoRA, RankStabilizedLoRA
from surm_jax.peft.methods.update import Update
from surm_jax.structured import LowRank, StructuredMatrix


class LoRAFormat(Format):
    """LoRA: peft computes `lora_alpha / r * lora_B @ lora_A`, the transpose of our update.

    `lora_A` is the transpose of `down` in our `LowRank`, (r, in), and `lora_B` is the transpose of `up`, (out, r). With
    `use_rslora` the factor in peft is `lora_alpha / sqrt(r)`. Such files are read, but never written: writing uses an
    equivalent `lora_alpha` without `use_rslora`.
    """

    peft_type = "LORA"
    settings = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
    mark = "lora_"
    description = "low rank"

    def holds(self, matrix: StructuredMatrix) -> bool:
        """Return whether a matrix is a `LowRank`."""
        return isinstance(matrix, LowRank)

    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings, which hold ranks and alphas, and both low-rank factors by module."""
        alphas = {module: tidy(update.factor * update.matrix.rank) for module, update in updates.items()}
        settings = {
            **by_module("r", "rank_pattern", {module: update.matrix.rank for module, update in updates.items()}),
            **by_module("lora_alpha", "alpha_pattern", alphas),
            "bias": "none",
        }
        arrays = {
            module: {"lora_A.weight": np.asarray(update.matrix.down).T, "lora_B.weight": np.asarray(update.matrix.up).T}
            for module, update in updates.items()
        }
        return settings, arrays

    def read_settings(self, settings: Settings, module: str, shape: tuple[int, int]) -> tuple[Update, Shapes]:
        """Return a `LoRA` or `RankStabilizedLoRA` update with the same rank and alpha, and the tensors' shapes."""
        rank = int(settings.of_module("r", 8, "rank_pattern", module, whole=True))
        alpha = settings.of_module("lora_alpha", 8, "alpha_pattern", module)
        method = RankStabilizedLoRA if settings.flag("use_rslora") else LoRA
        return method(rank=rank, alpha=alpha), {"lora_A.weight": (rank, shape[0]), "lora_B.weight": (shape[1], rank)}

    def read(self, arrays: Arrays) -> LowRank:
        """Return the `LowRank` matrix."""
        return LowRank(down=jnp.asarray(arrays["lora_A.weight"].T), up=jnp.asarray(arrays["lora_B.weight"].T))
