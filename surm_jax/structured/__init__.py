"""Structured matrices in pure JAX, with few parameters and a fast product `x @ M`.

`nearest` finds the structured matrix that approximates a dense one best. The example makes the elementwise product of
two circulant matrices. It has 1536 parameters in training, and `compact` returns an equal matrix with 768.

>>> import jax
>>> M = CirculantPair.init(jax.random.key(0), (768, 768), scale=1.0)
>>> M
CirculantPair(r1=float32[768], r2=float32[768], shape=(768, 768))
>>> M.num_params, M.compact().num_params
(1536, 768)
"""

from surm_jax.structured.algebra import Product, Scaled, Sum
from surm_jax.structured.analysis.approximation import Approximation, approximations
from surm_jax.structured.analysis.diagnostics import (
    condition_number,
    displacement_rank,
    log_determinant,
    numerical_rank,
    singular_values,
)
from surm_jax.structured.base import Piece, StructuredMatrix, checked_shape, compute_dtype, static
from surm_jax.structured.families.base import FAMILIES, Family, checked_dense, family
from surm_jax.structured.families.block_circulant import BlockCirculant
from surm_jax.structured.families.circulant import Circulant, CirculantPair
from surm_jax.structured.families.dense import Dense
from surm_jax.structured.families.diagonal_circulant import DiagonalCirculant
from surm_jax.structured.families.f_circulant import FCirculant, SkewCirculant
from surm_jax.structured.families.factors.block_low_rank import BlockLowRank
from surm_jax.structured.families.factors.khatri_rao import KhatriRao
from surm_jax.structured.families.factors.kronecker import Kronecker, near_square_factors
from surm_jax.structured.families.factors.low_rank import LowRank
from surm_jax.structured.families.factors.low_rank_kronecker import LowRankKronecker
from surm_jax.structured.families.factors.monarch import Monarch
from surm_jax.structured.families.low_displacement import LowDisplacementRank
from surm_jax.structured.families.tiled import COMPRESSIONS, DECOMPRESSIONS, Tiled, tiled_side
from surm_jax.structured.families.toeplitz import SymmetricToeplitz, Toeplitz
from surm_jax.structured.families.toeplitz_pair import SymmetricToeplitzPair, ToeplitzPair
from surm_jax.structured.fit import refine
from surm_jax.structured.placed import Placed
from surm_jax.structured.products.execution import EXECUTIONS, Dot, check_execution, matmul, updated_matmul
from surm_jax.structured.products.fourier import circular_convolve, fast_length, skew_convolve
from surm_jax.structured.products.rows import rows

__all__ = [
    "COMPRESSIONS",
    "DECOMPRESSIONS",
    "EXECUTIONS",
    "FAMILIES",
    "Approximation",
    "BlockCirculant",
    "BlockLowRank",
    "Circulant",
    "CirculantPair",
    "Dense",
    "DiagonalCirculant",
    "Dot",
    "FCirculant",
    "Family",
    "KhatriRao",
    "Kronecker",
    "LowDisplacementRank",
    "LowRank",
    "LowRankKronecker",
    "Monarch",
    "Piece",
    "Placed",
    "Product",
    "Scaled",
    "SkewCirculant",
    "StructuredMatrix",
    "Sum",
    "SymmetricToeplitz",
    "SymmetricToeplitzPair",
    "Tiled",
    "Toeplitz",
    "ToeplitzPair",
    "approximations",
    "check_execution",
    "checked_dense",
    "checked_shape",
    "circular_convolve",
    "compute_dtype",
    "condition_number",
    "displacement_rank",
    "family",
    "fast_length",
    "log_determinant",
    "matmul",
    "near_square_factors",
    "numerical_rank",
    "refine",
    "rows",
    "singular_values",
    "skew_convolve",
    "static",
    "tiled_side",
    "updated_matmul",
]
