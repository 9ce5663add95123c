"""Read and write folders of Hugging Face transformers. Importing this package registers its architectures."""

from surm_jax.pretrained.hf import decoders, text, vision
from surm_jax.pretrained.hf.architecture import (
    ARCHITECTURES,
    ARRAY,
    CONV,
    EMBEDDING,
    LINEAR,
    LINEAR_OUT,
    NORM,
    VECTOR,
    Architecture,
    Name,
    Names,
    Tensor,
    architecture_of,
    register_architecture,
)

__all__ = [
    "ARCHITECTURES",
    "ARRAY",
    "CONV",
    "EMBEDDING",
    "LINEAR",
    "LINEAR_OUT",
    "NORM",
    "VECTOR",
    "Architecture",
    "Name",
    "Names",
    "Tensor",
    "architecture_of",
    "decoders",
    "register_architecture",
    "text",
    "vision",
]
