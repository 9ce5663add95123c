"""Structured matrices in pure JAX: few numbers, a fast `x @ M`, the nearest member to a dense matrix.

>>> import jax
>>> M = CirculantPair.init(jax.random.key(0), (768, 768), scale=1.0)
>>> M
CirculantPair(r1=float32[768], r2=float32[768], shape=(768, 768))
>>> M.num_params, M.fused().num_params
(1536, 768)
"""

from surm_jax.structured.base import FAMILIES, StructuredMatrix, compute_dtype, family, static
from surm_jax.structured.circulant import Circulant, CirculantPair
from surm_jax.structured.fourier import BATCH_AXES, batch_local, circular_convolve
from surm_jax.structured.low_rank import LowRank

__all__ = [
    "BATCH_AXES",
    "FAMILIES",
    "Circulant",
    "CirculantPair",
    "LowRank",
    "StructuredMatrix",
    "batch_local",
    "circular_convolve",
    "compute_dtype",
    "family",
    "static",
]
