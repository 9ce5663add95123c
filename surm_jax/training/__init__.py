"""Training runs, which turn a configuration into a trained adapter, on any number of devices."""

from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, parse

__all__ = ["RunConfig", "base_config", "parse"]
