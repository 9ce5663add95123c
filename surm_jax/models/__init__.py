"""Models in Flax NNX, exact to the code their checkpoints come from. They know nothing of adapters."""

from surm_jax.models.base import (
    DTYPES,
    HEAD,
    MODELS,
    Config,
    Model,
    model_class,
    model_of_variant,
    register_model,
    variant_names,
)
from surm_jax.models.bert import Bert, BertConfig
from surm_jax.models.layers import ACTIVATIONS, REMAT, TARGETS, Blocks
from surm_jax.models.vit import ViT, ViTConfig

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "HEAD",
    "MODELS",
    "REMAT",
    "TARGETS",
    "Bert",
    "BertConfig",
    "Blocks",
    "Config",
    "Model",
    "ViT",
    "ViTConfig",
    "model_class",
    "model_of_variant",
    "register_model",
    "variant_names",
]
