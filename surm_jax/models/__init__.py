"""Transformer models in Flax NNX, which compute the same function as the code that their checkpoints come from.

They know nothing of adapters. `surm_jax.adapt` adds adapters to a model from outside.
"""

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
from surm_jax.models.decoder import Cache, Decoder
from surm_jax.models.decoder_config import DecoderConfig
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
    "Cache",
    "Config",
    "Decoder",
    "DecoderConfig",
    "Model",
    "ViT",
    "ViTConfig",
    "model_class",
    "model_of_variant",
    "register_model",
    "variant_names",
]
