"""Which structure fits a matrix: how much of its energy each family keeps within a budget of parameters."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.structured.base import FAMILIES, StructuredMatrix, checked_dense
from surm_jax.structured.families.kronecker import near_square_factors

#: The largest member of a family within a budget: the options of its `nearest` from (in, out) and the budget. A family
#: that is not here has one size only.
_OPTIONS: dict[str, Callable[[tuple[int, int], int], dict[str, Any]]] = {
    "LowRank": lambda shape, budget: {"rank": _clip(budget // sum(shape), min(shape))},
    "LowDisplacementRank": lambda shape, budget: {"rank": _clip(budget // (2 * max(shape)), min(shape))},
    "Kronecker": lambda shape, budget: {"terms": _kronecker_terms(shape, budget)},
    "LowRankKronecker": lambda shape, budget: {"rank": _kronecker_rank(shape, budget)},
    "BlockCirculant": lambda shape, budget: {"block": _block(shape, budget)},
    "Tiled": lambda shape, budget: {"side": _side(shape, budget)},
    "FCirculant": lambda shape, budget: {"f": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Approximation:
    """A family's nearest matrix to a target.

    Attributes:
        matrix: The matrix.
        options: What `nearest` was asked for besides the target, such as a rank.
        energy: The part of the target's energy that it keeps, `1 - ||target - M||_F^2 / ||target||_F^2`.
    """

    matrix: StructuredMatrix
    options: dict[str, Any]
    energy: float


def approximations(
    dense: Float[Array, "in out"], budget: int, *, steps: int = 200, progress: bool = False
) -> dict[str, Approximation]:
    """The nearest matrix of each family with at most `budget` parameters, the best family first.

    Families with a free size take the largest that the budget allows: the rank of low rank, of `W(G, H)` and of the
    second Kronecker factor, the number of Kronecker terms, the block of a block-circulant matrix, the side of a tile;
    of the f-circulants it is the triangular Toeplitz one, f = 0. Pairs count both of their vectors, as in training.
    Families that cannot be that small are left out.

    Args:
        dense: The target, (in_features, out_features), not all zeros.
        budget: The most parameters.
        steps: How far to search where `nearest` has no closed form (`W(G, H)`, the Toeplitz pairs, low-rank Kronecker).
        progress: Shows a bar for each search.

    Returns:
        By the family's name, in descending order of the energy kept.

    Raises:
        UserError: The target is not a finite floating-point matrix, or zero, or no family is that small.

    >>> shift = jnp.roll(jnp.eye(6), 1, axis=1)  # a circulant, and of full rank
    >>> kept = approximations(shift, budget=12, steps=0)
    >>> round(kept["Circulant"].energy, 3), round(kept["LowRank"].energy, 3)
    (1.0, 0.167)
    """
    dense = checked_dense("approximations", dense)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise UserError(f"approximations: budget must be a whole number of parameters, not {budget!r}")
    energy = jnp.sum(jnp.square(dense))
    if not (jnp.isfinite(energy) and energy > 0):
        raise UserError("approximations: the target, and the sum of its squares, must be finite and not zero")
    found = {}
    for name, family in FAMILIES.items():
        options = _OPTIONS.get(name, lambda shape, budget: {})(dense.shape, budget)
        if None in options.values() or _num_params(family, dense.shape, options) > budget:
            continue
        search = {"steps": steps, "progress": progress}
        search = {k: v for k, v in search.items() if k in inspect.signature(family.nearest).parameters}
        matrix = family.nearest(dense, **options, **search)
        lost = float(jnp.sum(jnp.square(dense - matrix.to_dense())) / energy)
        found[name] = Approximation(matrix, options, 1 - lost)
    if not found:
        raise UserError(
            f"approximations: no family holds a {dense.shape[0]} x {dense.shape[1]} matrix in {budget} numbers"
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].energy))


def _clip(size: int, most: int) -> int | None:
    return min(size, most) if size >= 1 else None


def _kronecker_terms(shape: tuple[int, int], budget: int) -> int | None:
    (m1, n1), (m2, n2) = near_square_factors(shape)
    return _clip(budget // (m1 * n1 + m2 * n2), min(m1 * n1, m2 * n2))


def _kronecker_rank(shape: tuple[int, int], budget: int) -> int | None:
    (m1, n1), (m2, n2) = near_square_factors(shape)
    return _clip((budget - m1 * n1) // (m2 + n2), min(m2, n2))


def _side(shape: tuple[int, int], budget: int) -> int | None:
    # Of a tile no more is held than the matrix has of it.
    square = math.isqrt(max(0, budget))
    return (square if square <= min(shape) else min(budget // min(shape), max(shape))) or None


def _block(shape: tuple[int, int], budget: int) -> int | None:
    # Smaller blocks hold more numbers.
    m, n = shape
    common = math.gcd(m, n)
    return next((b for b in range(1, common + 1) if common % b == 0 and m * n // b <= budget), None)


def _num_params(family: type[StructuredMatrix], shape: tuple[int, int], options: dict[str, Any]) -> int:
    return jax.eval_shape(lambda: family.init(jax.random.key(0), shape, scale=1.0, **options)).num_params
