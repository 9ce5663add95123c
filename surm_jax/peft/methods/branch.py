"""The methods that add a small non-linear branch to the output of modules."""

import abc
import dataclasses
from typing import ClassVar

import jax

from surm_jax.errors import UserError
from surm_jax.peft.methods.base import PartMethod
from surm_jax.peft.methods.settings import at_least, one_of
from surm_jax.peft.parts.base import Place
from surm_jax.peft.parts.branch import ACTIVATIONS, BranchPart
from surm_jax.structured import StructuredMatrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch(PartMethod):
    """A branch added to the output X of a module: `X + act(X M) + b`, or `X + act(X D + d) U + b` through a waist.

    The first is SURM's adapter (arXiv 2406.17740, section 4.2). Its non-linearity comes after the whole matrix, so that
    the matrix can be stored in its smallest form. The second is Houlsby's (arXiv 1902.00751).

    Attributes:
        alpha: The factor of the branch.
        bias: Whether b (and d) exist; they start at 0.
        activation: One of `ACTIVATIONS`.
        dropout: Probability of zeroing an entry of the branch's input while training.
        waisted: Whether there are two matrices, of which the first is random at the start.
    """

    part: ClassVar[type[BranchPart]] = BranchPart
    target: ClassVar[str] = "houlsby"
    waisted: ClassVar[bool] = False
    alpha: float = 1.0
    bias: bool = True
    activation: str = one_of("gelu", tuple(ACTIVATIONS))
    dropout: float = at_least(0.0, 0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation == "relu" and not self.waisted:
            # In JAX the slope of relu is 0 at 0, where x M starts.
            raise UserError(f"{self.name}.activation=relu would never learn, since its matrix starts at zero: try gelu")

    @abc.abstractmethod
    def init_branch(self, key: jax.Array, width: int) -> tuple[StructuredMatrix, ...]:
        """Return M, or D and U, of which the last is zero and can learn."""

    def make_part(self, place: Place, key: jax.Array) -> BranchPart:
        """Return the branch of one module at the start of training."""
        return self.part(
            self.init_branch(key, place.width),
            activation=self.activation,
            bias=self.bias,
            alpha=self.alpha,
            dropout=self.dropout,
        )
