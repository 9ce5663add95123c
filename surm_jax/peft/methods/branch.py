"""The base class of methods that add a small non-linear branch to the output of modules."""

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
    """A non-linear branch beside the output X of a module, `X + act(X M) + b` or `X + act(X D + d) U + b`.

    The first form, with one matrix M, is SURM's adapter (arXiv 2406.17740, section 4.2). Its non-linearity comes after
    the whole product X M, so that M can be stored in its smallest form. The second form, with the matrices D and U, is
    Houlsby's adapter (arXiv 1902.00751). Between D and U it has a hidden layer of few features, the waist.

    Attributes:
        alpha: The factor of the added term, which is `alpha * (act(X M) + b)` or `alpha * (act(X D + d) U + b)`.
        bias: Whether the branch has the bias b and, in the second form, d. They start at 0.
        activation: The name of the non-linearity `act`, one of `ACTIVATIONS`.
        dropout: The probability of zeroing an entry of the branch's input during training.
        waisted: Whether the branch has the second form. D is then random at the start.
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
            # X M starts at 0, where the derivative of JAX's relu is 0.
            raise UserError(f"{self.name}.activation=relu would never learn, since its matrix starts at zero: try gelu")

    @abc.abstractmethod
    def init_branch(self, key: jax.Array, width: int) -> tuple[StructuredMatrix, ...]:
        """Return the initial matrices of a branch, (M,) or (D, U).

        The last matrix equals zero, so that the branch adds nothing at first. The gradient of its arrays is not zero,
        so that it can be trained.
        """

    def make_part(self, place: Place, key: jax.Array) -> BranchPart:
        """Return the initial branch for one module."""
        return self.part(
            self.init_branch(key, place.width),
            activation=self.activation,
            bias=self.bias,
            alpha=self.alpha,
            dropout=self.dropout,
        )
