"""Text from a model that continues text: how the next token is chosen, and the loop that writes token after token."""

from surm_jax.generation.loop import Answer, generate
from surm_jax.generation.sampling import Sampling
from surm_jax.generation.settings import GENERATION_NAME, Settings, read_settings

__all__ = ["GENERATION_NAME", "Answer", "Sampling", "Settings", "generate", "read_settings"]
