"""LR-LoRA: a trained function of the entries of a low-rank matrix, by which training chooses the rank."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.base import AdapterParam
from surm_jax.peft.parts.entrywise import EntrywisePart
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import LowRank, StructuredMatrix

CENTERS = np.array([-14, -10, -6, -2, 2, 6, 10, 14]) / 7
"""The fixed numbers c_k, eight points from -2 to 2."""

_SLOPE = 0.3705
"""The start of a_k is `_SLOPE * c_k`. Of these odd functions phi, this one is nearest to z from -2 to 2."""


class LearnedFunctionPart(EntrywisePart):
    """An update by `phi(z) = sum_k a_k sinc(w_k (z - c_k))` of the entries z of M, with trained a_k and w_k.

    Here, sinc(u) is sin(u) / u. There are eight fixed centers c_k from -2 to 2. The w_k are the softplus of the
    trained array `width`.

    Args:
        matrix: The matrix M.
        kernel: The layer's kernel, which is not used.
        **settings: The settings of `UpdatePart`.
    """

    formula = "phi({})"

    def __init__(self, matrix: StructuredMatrix, kernel: Float[Array, "in out"], **settings: Any) -> None:
        super().__init__(matrix, kernel, **settings)
        self.a = AdapterParam(jnp.asarray(_SLOPE * CENTERS, jnp.float32))
        self.width = AdapterParam(jnp.full(8, math.log(math.e - 1), jnp.float32))  # softplus gives 1

    def entries(self, matrix: Float[Array, "in out"], kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Return phi of all entries of M."""
        a, w = self.a[...], jax.nn.softplus(self.width[...])
        bumps = [jnp.sinc(w[k] * (matrix - center) / math.pi) for k, center in enumerate(CENTERS)]
        total = jnp.zeros_like(matrix)
        for k in range(4):
            # At the start, a[k] = -a[7 - k] and M is zero, so that both products are exactly zero.
            left, right = bumps[k], bumps[7 - k]
            total += (a[k] + a[7 - k]) / 2 * (left + right) + (a[k] - a[7 - k]) / 2 * (left - right)
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnableRank(Update):
    """A trained function of the entries of a low-rank matrix, `alpha / rank * phi(down @ up)` (arXiv 2606.04325).

    `phi(z) = sum_k a_k sinc(w_k (z - c_k))` has 16 trained numbers in each layer, a_k and w_k for k = 1 to 8, and the
    fixed centers c_k from -2 to 2. `up` starts at 0, and `down` at `N(0, 1 / in_features)`. We know the method from an
    account by others. In it, a starts at 0, so that phi stays even, and `up` cannot learn. Here, phi starts as an odd
    function near z, with a_k proportional to c_k.

    Attributes:
        rank: The rank of the matrix inside of phi. alpha is divided by it.
    """

    name: ClassVar[str] = "lr_lora"
    part: ClassVar[type[UpdatePart]] = LearnedFunctionPart
    takes_packed: ClassVar[bool] = False  # phi(0) need not stay 0, so that it would change blocks outside of M.
    rank: int = 8
    alpha: float = 16.0

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor, `1 / rank`."""
        del shape
        return 1 / self.rank

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return LowRank.init(key, shape, rank=self.rank, scale=shape[0] ** -0.5)
