"""ABBA: the entrywise product of two low-rank matrices."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.methods.update import Update
from surm_jax.peft.parts.base import AdapterParam
from surm_jax.peft.parts.update import UpdatePart
from surm_jax.structured import Dense, LowRank, StructuredMatrix


class ProductPart(UpdatePart):
    """An update by the entrywise product of two low-rank matrices, of ranks r1 and r2.

    The product has the rank r1 r2. Its factors are row-wise and column-wise Kronecker products of the factors of both
    matrices, so that `x @ M` never forms the dense M, as in the paper.

    Args:
        matrix: The second matrix.
        kernel: The layer's kernel. The first matrix starts at its nearest matrix of rank r1.
        rank: The number r1.
        **settings: The other settings of `UpdatePart`.
    """

    def __init__(self, matrix: StructuredMatrix, kernel: Float[Array, "in out"], *, rank: int, **settings: Any) -> None:
        super().__init__(matrix, kernel, **settings)
        near = LowRank.nearest(kernel.astype(jnp.float32), rank=rank)
        sizes = jnp.sqrt(jnp.linalg.norm(near.up, axis=1))  # the square roots of the singular values
        self.first_down = AdapterParam(near.down * sizes[None])
        self.first_up = AdapterParam(near.up / jnp.where(sizes == 0, 1, sizes)[:, None])

    @property
    def kind(self) -> str:
        """The names of the families of both matrices, with the sign of their entrywise product, for tables."""
        return "LowRank * LowRank"

    def form(self) -> str:
        """Return a description of the update, with the shapes of the arrays of both matrices."""
        return f"LowRank of rank {self.first_up.shape[0]} * {super().form()}"

    def matrix(self, scale: float | Array = 1.0) -> StructuredMatrix:
        """Return the product with all factors as one matrix of rank r1 r2, or as a dense one if this rank is full."""
        second = UpdatePart.matrix(self, scale)
        assert isinstance(second, LowRank)
        m, n = second.shape
        down = (self.first_down[...][:, :, None] * second.down[:, None, :]).reshape(m, -1)
        up = (self.first_up[...][:, None, :] * second.up[None, :, :]).reshape(-1, n)
        return LowRank(down=down, up=up) if len(up) <= min(m, n) else Dense(down @ up)

    def multiple(self) -> tuple[float, StructuredMatrix]:
        """Return 1 and the product with all factors. peft's LoRA can store it."""
        return 1.0, self.matrix()

    def fit(self, target: Float[np.ndarray, "in out"]) -> Float[np.ndarray, "in out"]:
        """Raise an error, because no method to find the nearest part is implemented.

        Raises:
            UserError: Always.
        """
        raise UserError("it multiplies two low-rank matrices entry by entry, and cannot be fitted to a given change")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ABBA(Update):
    """The entrywise product of two low-rank matrices, `alpha * (down1 @ up1) * (down2 @ up2)` (arXiv 2505.14238).

    The first matrix starts at the nearest matrix to the kernel, with the square roots of the singular values in both
    factors. `up2` starts at 0, and `down2` at `N(0, 2 / in_features)`. The released code (CERT-Lab/abba) draws `down2`
    uniformly with the same variance, and has two factors alpha1 = alpha2 = 8, so that `alpha = sqrt(alpha1 alpha2)`.

    Attributes:
        first_rank: The rank of the first matrix.
        rank: The rank of the second matrix.
    """

    name: ClassVar[str] = "abba"
    part: ClassVar[type[UpdatePart]] = ProductPart
    takes_packed: ClassVar[bool] = False  # The first matrix would mix the kernels of all blocks.
    first_rank: int = 4
    rank: int = 4
    alpha: float = 8.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> LowRank:
        """Return the initial second matrix. It is zero, but the gradient of its arrays is not."""
        return LowRank.init(key, shape, rank=self.rank, scale=(2 / shape[0]) ** 0.5)

    def part_settings(self) -> dict[str, Any]:
        """Return the rank of the first matrix, which `part` takes as an argument."""
        return {"rank": self.first_rank}
