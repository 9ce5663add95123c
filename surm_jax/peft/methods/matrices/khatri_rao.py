"""KRAdapter: updates by a Khatri-Rao product."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.matrices.kronecker import kaiming_uniform
from surm_jax.peft.methods.update import Update
from surm_jax.structured import KhatriRao


@dataclasses.dataclass(frozen=True, kw_only=True)
class KRAdapter(Update):
    """A Khatri-Rao product, whose rows are Kronecker products of the rows of V and U (KRAdapter, arXiv 2508.00230).

    Its rank is usually full. It has about `2 n^1.5` parameters for an n x n kernel. U starts at 0. V starts at
    Kaiming-uniform random numbers, as for a layer with as many inputs as V has rows. alpha is 2, as in the released
    code.

    >>> KRAdapter().init(jax.random.key(0), (768, 768)).num_params
    43008
    """

    name: ClassVar[str] = "kradapter"
    alpha: float = 2.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> KhatriRao:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        matrix = KhatriRao.init(key, shape, scale=1.0)
        return matrix.with_arrays(V=kaiming_uniform(key, matrix.V.shape, matrix.V.shape[0]))
