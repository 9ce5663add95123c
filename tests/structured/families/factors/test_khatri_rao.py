"""Compare `KhatriRao` with `scipy.linalg.khatri_rao`, and `nearest` with SVDs of reshaped rows."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.structured import KhatriRao
from tests.structured.cases import StructuredMatrixContract, assert_close


def rows_of(U, V, longer):
    # SciPy's product is column-wise, and the index of its second factor runs faster.
    return scipy.linalg.khatri_rao(V.T, U.T).T[:, :longer]


class TestKhatriRao(StructuredMatrixContract):
    family = KhatriRao

    def dense(self, arrays, shape):
        rows = rows_of(arrays["U"], arrays["V"], max(shape))
        return rows.T if shape[0] > shape[1] else rows


def test_transpose_of_a_square_matrix():
    matrix = KhatriRao.random((9, 9))
    assert matrix.T.transposed and not matrix.T.T.transposed
    np.testing.assert_array_equal(matrix.T.to_dense(), np.asarray(matrix.to_dense()).T)


def test_numbers_of_kradapter_and_full_rank():
    assert KhatriRao.count((768, 768)) == 43_008
    assert np.linalg.matrix_rank(KhatriRao.random((40, 40)).to_dense()) == 40


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(9, 9), (4, 8), (8, 4)], ids=str)
def test_nearest_is_the_optimum_if_nothing_is_cut_off(shape):
    target = np.random.default_rng(0).normal(size=shape)
    found = np.asarray(KhatriRao.nearest(target).to_dense())
    rows = target if shape[0] <= shape[1] else target.T
    width = int(np.sqrt(min(shape)))
    left = sum(np.sum(np.linalg.svd(row.reshape(-1, width), compute_uv=False)[1:] ** 2) for row in rows)
    assert np.sum((target - found) ** 2) == pytest.approx(left)


def test_the_search_finds_a_member_again_whose_last_columns_are_cut_off():
    target = np.asarray(KhatriRao.random((5, 11)).to_dense())
    start, found = (KhatriRao.nearest(jnp.asarray(target), steps=steps).to_dense() for steps in (0, 200))
    assert np.linalg.norm(found - target) < 0.02 * np.linalg.norm(target) < np.linalg.norm(start - target)
    assert_close(found + 1, target + 1, "bfloat16")
