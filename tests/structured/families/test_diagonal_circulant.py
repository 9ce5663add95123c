"""Compare `DiagonalCirculant` with products of `numpy.diag` and `scipy.linalg.circulant`."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.structured import Circulant, DiagonalCirculant
from tests.structured.cases import StructuredMatrixContract


class TestDiagonalCirculant(StructuredMatrixContract):
    family = DiagonalCirculant

    def dense(self, arrays, shape):
        m, n = shape
        return np.diag(arrays["a"]) @ scipy.linalg.circulant(arrays["c"]).T[:m, :n] @ np.diag(arrays["b"])


def test_the_formula_of_the_paper():
    rng = np.random.default_rng(0)
    a1, c2, a3, x = rng.normal(size=(4, 6)).astype("float32")
    W = np.diag(a3) @ scipy.linalg.circulant(c2) @ np.diag(a1)
    matrix = DiagonalCirculant(c=jnp.asarray(c2), a=jnp.asarray(a1), b=jnp.asarray(a3))
    np.testing.assert_allclose(matrix.apply(x), W @ x, rtol=1e-4)


def test_numbers_of_cdvft():
    assert DiagonalCirculant.count((768, 768)) == 3 * 768


@pytest.mark.usefixtures("x64")
def test_the_search_is_better_than_the_nearest_circulant_and_does_not_depend_on_the_size_of_the_target():
    noise = np.random.default_rng(1).normal(size=(9, 7))
    circulant = np.linalg.norm(noise - Circulant.nearest(noise).to_dense()) / np.linalg.norm(noise)
    errors = [
        np.linalg.norm(target - DiagonalCirculant.nearest(target).to_dense()) / np.linalg.norm(target)
        for target in (noise, 1e-20 * noise, 1e20 * noise)
    ]
    assert errors[0] < circulant - 0.01
    np.testing.assert_allclose(errors, errors[0], rtol=0.02)
