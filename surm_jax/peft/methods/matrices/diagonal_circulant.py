"""CDVFT: updates by a circulant matrix between two diagonal matrices."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.update import Update
from surm_jax.structured import DiagonalCirculant


@dataclasses.dataclass(frozen=True, kw_only=True)
class CDVFT(Update):
    """A product `diag(a) C(c) diag(b)` of a diagonal, a circulant and a diagonal matrix (CDVFT, arXiv 2505.00580).

    It has 3n parameters for an n x n kernel. c starts at 0, and a and b at `scale * N(0, 1)`; the paper's start is not
    known to us. If in_features and out_features differ, the circulant is a block of a larger one, where the paper
    divides it into blocks.

    >>> CDVFT().init(jax.random.key(0), (768, 768)).num_params
    2304
    """

    name: ClassVar[str] = "cdvft"
    scale: float = 1.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> DiagonalCirculant:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return DiagonalCirculant.init(key, shape, scale=self.scale)
