"""Models in Flax NNX, exact to the code their checkpoints come from. They know nothing of adapters."""

from surm_jax.models.bert import BERT_VARIANTS, Bert, BertConfig
from surm_jax.models.layers import REMAT, Blocks
from surm_jax.models.targets import HEAD, TARGETS
from surm_jax.models.vit import VARIANTS, ViT, ViTConfig

__all__ = ["BERT_VARIANTS", "HEAD", "REMAT", "TARGETS", "VARIANTS", "Bert", "BertConfig", "Blocks", "ViT", "ViTConfig"]
