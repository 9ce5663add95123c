"""Models in Flax NNX, exact to the code their checkpoints come from. They know nothing of adapters."""

from surm_jax.models.bert import BERT_VARIANTS, Bert, BertConfig
from surm_jax.models.targets import TARGETS
from surm_jax.models.vit import VARIANTS, ViT, ViTConfig

__all__ = ["BERT_VARIANTS", "TARGETS", "VARIANTS", "Bert", "BertConfig", "ViT", "ViTConfig"]
