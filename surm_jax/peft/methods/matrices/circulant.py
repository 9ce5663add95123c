"""Methods with circulant matrices: SURM's update and branch, and C3A's block-circulant update."""

import dataclasses
from typing import ClassVar

import jax

from surm_jax.peft.methods.branch import Branch
from surm_jax.peft.methods.settings import at_least
from surm_jax.peft.methods.update import Update
from surm_jax.structured import BlockCirculant, CirculantPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class CirculantUpdate(Update):
    """The circulant of the vector `r1 * r2`, which trains 2n parameters for an n x n kernel and stores n.

    The method is SURM's (arXiv 2406.17740, section 4.1). r1 starts at 0, r2 at `scale * N(0, 1)`. The learning rate
    applies to r1 and r2 directly: nothing is divided by n. With plain gradient descent, the first step of r1 is
    proportional to `scale`, and the first change of the update to `scale^2`. In this example, r1 and r2 have 768
    entries each, and a file stores the 768 entries of their product:

    >>> matrix = CirculantUpdate(scale=0.02).init(jax.random.key(0), (768, 768))
    >>> matrix.num_params, matrix.compact().num_params
    (1536, 768)
    """

    name: ClassVar[str] = "circulant"
    scale: float = 1.0

    def init(self, key: jax.Array, shape: tuple[int, int]) -> CirculantPair:
        """Return an initial circulant of the given shape. It is zero, but the gradient of its arrays is not."""
        return CirculantPair.init(key, shape, scale=self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CirculantBranch(Branch):
    """`X + gelu(X C) + b` with the circulant C of `r1 * r2`, which trains 3n parameters and stores 2n.

    The method is SURM's (arXiv 2406.17740, section 4.2). r1 starts at 0, and r2 at `scale * N(0, 1)`. The default scale
    is that of the code released with the paper.
    """

    name: ClassVar[str] = "circulant_adapter"
    scale: float = 0.02

    def init_branch(self, key: jax.Array, width: int) -> tuple[CirculantPair]:
        """Return an initial circulant. It is zero, but the gradient of its arrays is not."""
        return (CirculantPair.init(key, (width, width), scale=self.scale),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3A(Update):
    """A matrix of circulant blocks, `alpha / in_features * BlockCirculant(c)`, with in * out / block parameters.

    This is C3A (arXiv 2407.19342) with the scale of Hugging Face's peft, which divides by in_features. Its learning
    rates are therefore large (0.1 to 1). The parameters c start at 0. With one block, the matrix is the circulant of
    one vector. In this example, there are 6 x 6 blocks of 128 parameters each:

    >>> C3A(block=128).init(jax.random.key(0), (768, 768)).num_params
    4608

    Attributes:
        block: The number of rows and columns of a block, which must divide in_features and out_features. 0 means the
            largest such number.
    """

    name: ClassVar[str] = "c3a"
    learning_rate: ClassVar[float] = 1e-1
    block: int = at_least(0, 0)

    def unit(self, shape: tuple[int, int]) -> float:
        """Return the constant factor of C3A, `1 / in_features`."""
        return 1 / shape[0]

    def init(self, key: jax.Array, shape: tuple[int, int]) -> BlockCirculant:
        """Return an initial matrix of the given shape. It is zero, but the gradient of its arrays is not."""
        return BlockCirculant.init(key, shape, scale=1.0, block=self.block or None)
