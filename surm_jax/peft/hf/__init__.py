"""Adapters of Hugging Face's peft: its folders written from our adapters, and read into our models."""

from surm_jax.peft.hf.load import load_hf_adapter as load_hf_adapter
from surm_jax.peft.hf.names import ModuleNames as ModuleNames
from surm_jax.peft.hf.save import save_hf_adapter as save_hf_adapter
