"""Pretrained weights: where they are, what their formats call each parameter, and how they get into a model."""

from surm_jax.pretrained.augreg import AUGREG_URLS
from surm_jax.pretrained.loading import load
from surm_jax.pretrained.native import save_model
from surm_jax.pretrained.sources import locate

__all__ = ["AUGREG_URLS", "load", "locate", "save_model"]
