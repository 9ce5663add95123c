"""Models in Flax NNX, exact to the code their checkpoints come from. They know nothing of adapters."""

from surm_jax.models.vit import TARGETS, VARIANTS, ViT, ViTConfig

__all__ = ["TARGETS", "VARIANTS", "ViT", "ViTConfig"]
