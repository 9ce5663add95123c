"""Comparison of families on one matrix: the energy that each of them keeps within a budget of parameters."""

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
    """A family's nearest matrix to a target.

    Attributes:
        matrix: The matrix.
        options: The options passed to `nearest`, such as a rank.
        energy: The share of the target's energy that the matrix keeps, `1 - ||target - M||_F^2 / ||target||_F^2`.
    """

    matrix: StructuredMatrix
    options: dict[str, Any]
    energy: float


def approximations(
    dense: Float[Array, "in out"], budget: int, *, steps: int = 200, progress: bool = False
) -> dict[str, Approximation]:
    """Return the nearest matrix of each family with at most `budget` parameters, the best family first.

    Each family chooses the largest size that the budget allows (`Family.options_within`), such as a rank, the number of
    Kronecker terms, or the block of a block-circulant matrix. The two vectors of a pair both count, as in training.
    Families whose smallest member exceeds the budget are left out.

    Args:
        dense: The target, (in_features, out_features), not all zeros.
        budget: Largest number of parameters.
        steps: Largest number of steps, for families whose `nearest` is a search (`Family.searches`).
        progress: Whether to show a bar for each search.

    Returns:
        The matrices by the family's name, in descending order of the energy kept.

    Raises:
        UserError: The target is not a finite floating-point matrix or is zero, the budget is not an integer, or every
            family needs more parameters.

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
    """Return the squared Frobenius norm of the difference."""
    return jnp.sum(jnp.square(dense - matrix.to_dense()))
