"""The LoRA of peft."""

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
    """`lora_alpha / r * lora_B @ lora_A`: of our `LowRank`, `lora_A` is down^T (r, in) and `lora_B` is up^T (out, r).

    With `use_rslora` the factor there is `lora_alpha / sqrt(r)`; it is read, and written as an alpha without.
    """

    peft_type = "LORA"
    settings = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
    mark = "lora_"
    description = "low rank"

    def holds(self, matrix: StructuredMatrix) -> bool:
        """Say whether it is of low rank."""
        return isinstance(matrix, LowRank)

    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return rank and alpha, and both factors."""
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
        """Return `LoRA` with the same factor."""
        rank = int(settings.of_module("r", 8, "rank_pattern", module, whole=True))
        alpha = settings.of_module("lora_alpha", 8, "alpha_pattern", module)
        method = RankStabilizedLoRA if settings.flag("use_rslora") else LoRA
        return method(rank=rank, alpha=alpha), {"lora_A.weight": (rank, shape[0]), "lora_B.weight": (shape[1], rank)}

    def read(self, arrays: Arrays) -> LowRank:
        """Return the matrix of low rank."""
        return LowRank(down=jnp.asarray(arrays["lora_A.weight"].T), up=jnp.asarray(arrays["lora_B.weight"].T))
