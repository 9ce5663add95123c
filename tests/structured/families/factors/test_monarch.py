"""Compare `Monarch` with block-diagonal and permutation matrices, and `nearest` with SVDs of submatrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import Monarch
from tests.structured.cases import ProjectionContract, assert_close


def dense_product(R, L):
    """Return the product of both block-diagonal factors, each followed by its permutation matrix."""
    N, _, r = R.shape
    n = N * L.shape[2]
    deal, back = np.zeros((N * r, N * r)), np.zeros((n, n))
    for t in range(N * r):
        deal[t, (t % N) * r + t // N] = 1
    for output in range(n):
        back[(output % N) * (n // N) + output // N, output] = 1
    return scipy.linalg.block_diag(*R) @ deal @ scipy.linalg.block_diag(*L) @ back


class TestMonarch(ProjectionContract):
    family = Monarch

    def dense(self, arrays, shape):
        R, L = arrays["R"], arrays["L"]
        return dense_product(R, L) if (R.shape[0] * R.shape[1], L.shape[0] * L.shape[2]) == shape else None


def random(N, p, r, s):
    rng = np.random.default_rng(0)
    return Monarch(*(jnp.asarray(rng.normal(size=shape), "float32") for shape in ((N, p, r), (N, r, s))))


@pytest.mark.parametrize(("blocks", "rank"), [(2, 1), (3, 2), (2, 4), (2, 3), (6, 6)], ids=str)
def test_ranks_that_divide_the_number_of_blocks_and_others(blocks, rank):
    matrix = random(blocks, 12 // blocks, rank, 6 // blocks)
    expected = dense_product(np.asarray(matrix.R), np.asarray(matrix.L))
    assert_close(matrix.to_dense(), expected, "float32")
    assert_close(matrix.T.to_dense(), expected.T, "float32")
    assert_close(Monarch.nearest(expected, rank=rank, blocks=blocks).to_dense(), expected, "float32")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("blocks", "rank"), [(2, 1), (2, 3), (3, 3), (2, 4)], ids=str)
def test_nearest_leaves_the_smallest_singular_values_of_every_submatrix(blocks, rank):
    target = np.random.default_rng(0).normal(size=(12, 18))
    found = Monarch.nearest(target, rank=rank, blocks=blocks)
    left = 0.0
    for k in range(blocks):
        rows = target[k * 12 // blocks : (k + 1) * 12 // blocks]
        for group in range(blocks):
            kept = sum(t // rank == k and t % blocks == group for t in range(blocks * rank))
            left += np.sum(np.linalg.svd(rows[:, group::blocks], compute_uv=False)[kept:] ** 2)
    assert np.sum((target - np.asarray(found.to_dense())) ** 2) == pytest.approx(left, rel=1e-10)


def test_numbers_of_more_and_its_rank():
    # Table of MoRe: 4 blocks of inner width 4 in a 768 x 768 kernel.
    assert Monarch.count((768, 768), rank=4) == 6144
    matrix = random(4, 8, 4, 8)
    assert matrix.rank == 4 and np.linalg.matrix_rank(matrix.to_dense()) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "a 12 x 18 matrix has a rank from 1 to 12, but 0 was asked for"),
        ({"rank": 13}, "a rank from 1 to 12, but 13 was asked for"),
        ({"rank": 1, "blocks": 4}, "the number of blocks must divide 12 and 18, but 4 was asked for"),
        ({"rank": 1, "blocks": 0}, "the number of blocks must divide 12 and 18, but 0 was asked for"),
    ],
    ids=str,
)
def test_impossible_sizes(options, message):
    with pytest.raises(UserError, match=message):
        Monarch.init(jax.random.key(0), (12, 18), scale=1.0, **options)
    with pytest.raises(UserError, match=message):
        Monarch.nearest(jnp.ones((12, 18)), **options)


def test_default_blocks():
    assert Monarch.init(jax.random.key(0), (12, 18), scale=1.0, rank=1).blocks == 3
    assert Monarch.init(jax.random.key(0), (5, 7), scale=1.0, rank=1).blocks == 1
