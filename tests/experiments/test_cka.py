"""Compare linear CKA, a similarity of hidden states, with its definition by centred Gram matrices in numpy."""

import numpy as np
import pytest

from experiments.cka import linear_cka
from surm_jax.errors import UserError


def by_gram_matrices(x, y):
    """Return the linear CKA by its definition, equations 3 and 4 of arXiv 1905.00414.

    It is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the Gram matrices K = X X^T and L = Y Y^T.
    """
    n = len(x)
    H = np.eye(n) - np.ones((n, n)) / n

    def hsic(K, L):
        return np.trace(K @ H @ L @ H) / (n - 1) ** 2

    K, L = x @ x.T, y @ y.T
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


@pytest.mark.parametrize(("examples", "d1", "d2"), [(30, 5, 8), (6, 20, 3), (2, 1, 1)])
def test_is_its_definition(examples, d1, d2):
    draws = np.random.default_rng(examples)
    x = draws.normal(2.0, 1.0, (examples, d1))
    y = np.tanh(x @ draws.normal(size=(d1, d2))) + draws.normal(size=(examples, d2))
    np.testing.assert_allclose(linear_cka(x, y), by_gram_matrices(x, y), rtol=1e-10)


def test_does_not_see_rotations_scales_and_shifts():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(40, 6)), draws.normal(size=(40, 4))
    rotation, _ = np.linalg.qr(draws.normal(size=(6, 6)))
    np.testing.assert_allclose(linear_cka(x, x), 1.0, rtol=1e-12)
    np.testing.assert_allclose(linear_cka(x, 1e-3 * x @ rotation + 7.0), 1.0, rtol=1e-9)
    np.testing.assert_allclose(linear_cka(x @ rotation, y), linear_cka(y, x), rtol=1e-12)
    # Other linear maps, such as scaling a single column, do change the value.
    assert linear_cka(x, x * [10, 1, 1, 1, 1, 1]) < 0.9


def test_float32_is_not_rounded_on_the_way():
    draws = np.random.default_rng(1)
    x, y = (1000 + draws.normal(size=(50, 3)) for _ in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    np.testing.assert_allclose(linear_cka(x, y), by_gram_matrices(x.astype(float), y.astype(float)), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones(3), np.eye(3), r"the first representation must be a matrix \(examples, d\), not \(3,\)"),
        (np.eye(3), np.eye(4), "of the same examples, not of 3 and 4"),
        (np.eye(3), np.full((3, 2), np.nan), "the second representation holds numbers that are not finite"),
        (np.full((3, 2), 0.1), np.eye(3), "the first representation is the same for all 3 examples"),
    ],
)
def test_refuses_what_cannot_be_compared(x, y, message):
    with pytest.raises(UserError, match=message):
        linear_cka(x, y)
