"""Comparison of how well each family of matrices approximates a target matrix with a limited number of parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix
from surm_jax.structured.families.base import FAMILIES, checked_dense


@dataclasses.dataclass(frozen=True)
class Approximation:
    """The best approximation of a target matrix that one family found.

    Attributes:
        matrix: The structured matrix M that approximates the target.
        options: The options that were passed to the `nearest` method of the family, such as `rank`.
        energy: The share of the target's energy (its squared Frobenius norm) that M keeps,
            `1 - ||target - M||_F^2 / ||target||_F^2`. It is 1 if M equals the target.
    """

    matrix: StructuredMatrix
    options: dict[str, Any]
    energy: float


def approximations(
    dense: Float[Array, "in out"], budget: int, *, steps: int = 200, progress: bool = False
) -> dict[str, Approximation]:
    """Approximate `dense` by a matrix of every family, with at most `budget` parameters each.

    Each family chooses its options, such as a rank, the number of Kronecker terms, or the block size of a
    block-circulant matrix, so that the number of parameters is as large as the budget allows
    (`Family.options_within`). The method `nearest` of the family then computes the approximation. Both vectors of a
    `CirculantPair` count as parameters, because both are trained. A family is left out if even its smallest matrix has
    more parameters than the budget.

    Args:
        dense: The target, an array of shape (in_features, out_features) that is not all zeros.
        budget: Largest number of parameters.
        steps: Largest number of optimisation steps, for families whose `nearest` is an iterative search
            (`Family.searches` is true).
        progress: Whether to show a progress bar for each search.

    Returns:
        A dictionary from the name of the family to its approximation. The family that keeps the most energy is first.

    Raises:
        UserError: The target is not a finite floating-point matrix or is zero, the budget is not an integer, or every
            family needs more parameters than the budget.

    In the example, the target is a circulant matrix, so the approximation of the family `Circulant` equals it and keeps
    its whole energy. The nearest symmetric Toeplitz matrix keeps half of the energy.

    >>> shift = jnp.roll(jnp.eye(6), 1, axis=1)  # a circulant of full rank
    >>> kept = approximations(shift, budget=6)
    >>> round(kept["Circulant"].energy, 3), round(kept["SymmetricToeplitz"].energy, 3)
    (1.0, 0.5)
    """
    dense = checked_dense("approximations", dense)
    m, n = dense.shape
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise UserError(f"approximations: budget must be a whole number of parameters, not {budget!r}")
    energy = jnp.sum(jnp.square(dense))
    if not (jnp.isfinite(energy) and energy > 0):
        raise UserError("approximations: the target, and the sum of its squares, must be finite and not zero")
    found = {}
    for name, family in FAMILIES.items():
        options = family.options_within((m, n), budget)
        if options is None:
            continue
        search = {"steps": steps, "progress": progress} if family.searches else {}
        matrix = family.nearest(dense, **options, **search)
        lost = float(_distance(matrix, dense) / energy)
        found[name] = Approximation(matrix, options, 1 - lost)
    if not found:
        raise UserError(f"approximations: no family has a {m} x {n} matrix with at most {budget} parameters")
    return dict(sorted(found.items(), key=lambda item: -item[1].energy))


@jax.jit
def _distance(matrix: StructuredMatrix, dense: Float[Array, "in out"]) -> Float[Array, ""]:
    """Return the squared Frobenius norm of `dense - matrix`."""
    return jnp.sum(jnp.square(dense - matrix.to_dense()))
