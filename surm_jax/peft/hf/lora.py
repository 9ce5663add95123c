"""The file format of LoRA adapters in peft."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from surm_jax.peft.hf.format import Arrays, Format, LayerUpdate, Shapes, by_module, tidy
from surm_jax.peft.hf.settings import Settings
from surm_jax.peft.methods.matrices.lora import LoRA, RankStabilizedLoRA
from surm_jax.peft.methods.update import Update
from surm_jax.structured import LowRank, StructuredMatrix


class LoRAFormat(Format):
    """The file format of LoRA, which stores two low-rank factors for each layer.

    The update in peft is `lora_alpha / r * lora_B @ lora_A`, which is the transpose of our update. `lora_A` of shape
    (r, in) is the transpose of `down` in our `LowRank`, and `lora_B` of shape (out, r) is the transpose of `up`. With
    the setting `use_rslora`, peft multiplies by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`. Files with this
    setting can be read, but are never written. Instead, an equivalent `lora_alpha` is written without `use_rslora`.
    """

    peft_type = "LORA"
    settings = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
    mark = "lora_"
    description = "low rank"

    def holds(self, matrix: StructuredMatrix) -> bool:
        """Return whether a matrix is a `LowRank`, the product of two low-rank factors."""
        return isinstance(matrix, LowRank)

    def write(self, updates: Mapping[str, LayerUpdate]) -> tuple[dict[str, Any], dict[str, Arrays]]:
        """Return the settings and the tensors that store the updates of all modules.

        The settings contain ranks and alphas. The tensors of a module are its two low-rank factors.
        """
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
        """Convert the settings to a method, and return it with the shapes of `lora_A` and `lora_B`.

        The method is `RankStabilizedLoRA` if `use_rslora` is set, and `LoRA` otherwise. In peft the rank may be larger
        than in_features or out_features, as in a head with two classes. Our method then has the largest possible rank.
        """
        rank = int(settings.of_module("r", 8, "rank_pattern", module, whole=True))
        alpha = settings.of_module("lora_alpha", 8, "alpha_pattern", module)
        kind = RankStabilizedLoRA if settings.flag("use_rslora") else LoRA
        method = kind(rank=rank, alpha=alpha)
        if rank > (most := min(shape)):  # `read` returns a matrix of rank `most`, which gets the same factor.
            method = kind(rank=most, alpha=tidy(method.factor(shape) / kind(rank=most).unit(shape)))
        return method, {"lora_A.weight": (rank, shape[0]), "lora_B.weight": (shape[1], rank)}

    def read(self, arrays: Arrays) -> LowRank:
        """Return the `LowRank` matrix whose factors the tensors of a layer hold.

        If the rank exceeds the numbers of features, one factor is the whole product and the other the identity.
        """
        down, up = arrays["lora_A.weight"].T, arrays["lora_B.weight"].T
        if len(up) > min(len(down), up.shape[1]):
            product = (down.astype(np.float64) @ up).astype(np.float32)
            identity = np.eye(min(product.shape), dtype=np.float32)
            down, up = (product, identity) if len(product) > len(identity) else (identity, product)
        return LowRank(down=jnp.asarray(down), up=jnp.asarray(up))
