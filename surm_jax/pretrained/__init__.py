"""Locate, read and write the checkpoints of pretrained models, in several file formats."""

from surm_jax.pretrained.augreg import AUGREG_URLS
from surm_jax.pretrained.hf.folder import huggingface_names, save_huggingface
from surm_jax.pretrained.loading import from_pretrained, image_normalization, image_preparation, load, model_config
from surm_jax.pretrained.native import save_model
from surm_jax.pretrained.sources import locate

__all__ = [
    "AUGREG_URLS",
    "from_pretrained",
    "huggingface_names",
    "image_normalization",
    "image_preparation",
    "load",
    "locate",
    "model_config",
    "save_huggingface",
    "save_model",
]
