"""How alike two representations of the same examples are: linear CKA, of which rotations and scales are no part."""

import numpy as np
from jaxtyping import ArrayLike, Float

from surm_jax.errors import UserError


def linear_cka(x: Float[ArrayLike, "examples d1"], y: Float[ArrayLike, "examples d2"]) -> float:
    """Returns the linear centred kernel alignment of two representations, from 0 to 1.

    `|Y^T X|^2 / (|X^T X| |Y^T Y|)` in Frobenius norms, every column centred: Kornblith et al. (2019), arXiv 1905.00414.
    Rotations, shifts and multiples of either representation leave it as it is; other linear maps do not. Calculated in
    float64, O(examples d1 d2), without the Gram matrices of the definition.

    Args:
        x: (examples, d1), any real dtype.
        y: (examples, d2), of the same examples in the same order.

    Raises:
        UserError: one is not a matrix, they differ in the number of examples, or one holds numbers that are not finite
            or the same row for all examples, which leaves nothing to compare.

    >>> points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(linear_cka(points, 3 * points[:, ::-1] + 1), 6)
    1.0
    >>> round(linear_cka(points[:, :1], points[:, 1:]), 6)
    0.0
    """
    x, y = _centred("the first", x), _centred("the second", y)
    if len(x) != len(y):
        raise UserError(f"linear_cka: both representations must be of the same examples, not of {len(x)} and {len(y)}")
    cross, own_x, own_y = (np.linalg.norm(product) for product in (y.T @ x, x.T @ x, y.T @ y))
    return float(cross**2 / (own_x * own_y))


def _centred(which: str, values: ArrayLike) -> Float[np.ndarray, "examples d"]:
    """The representation in float64, every column with mean 0."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2:
        raise UserError(f"linear_cka: {which} representation must be a matrix (examples, d), not {values.shape}")
    if not np.isfinite(values).all():
        raise UserError(f"linear_cka: {which} representation holds numbers that are not finite")
    if (values == values[:1]).all():
        raise UserError(f"linear_cka: {which} representation is the same for all {len(values)} examples")
    return values - values.mean(axis=0)
