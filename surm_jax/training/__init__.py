"""Runs: from a configuration to a trained adapter, on any number of devices."""

from surm_jax.training.config import RunConfig as RunConfig
from surm_jax.training.config import base_config as base_config
from surm_jax.training.config import parse as parse
