"""Read and write adapter folders in the format of Hugging Face's peft."""

from surm_jax.peft.hf import c3a, gralora, lokr, lora  # noqa: F401  # importing them registers their formats
from surm_jax.peft.hf.load import load_peft
from surm_jax.peft.hf.names import ModuleNames
from surm_jax.peft.hf.save import save_peft

__all__ = ["ModuleNames", "load_peft", "save_peft"]
