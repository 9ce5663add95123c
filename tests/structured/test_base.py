"""Tests of two conventions of all structured matrices: the orientation `y = x @ M` and the dtypes of products."""

import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.structured import Circulant, Toeplitz, compute_dtype


def test_orientation():
    """Check that M has the shape (in_features, out_features), as a kernel in Flax, and that `apply` returns `x @ M`."""
    M = Toeplitz(jnp.array([1.0, 2.0, 3.0, 4.0]), shape=(2, 3))
    np.testing.assert_array_equal(M.to_dense(), [[2, 3, 4], [1, 2, 3]])
    np.testing.assert_allclose(M.apply(jnp.array([1.0, 10.0])), [12, 23, 34], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bfloat16",), "float32"),
        (("float16", "bfloat16"), "float32"),
        (("bfloat16", "float32"), "float32"),
        (("bfloat16", "float64"), "float64"),
    ],
)
def test_compute_dtype(dtypes, expected):
    assert compute_dtype(*map(jnp.dtype, dtypes)) == jnp.dtype(expected)


@pytest.mark.usefixtures("x64")
def test_double_parameters_work_in_double_on_single_input():
    matrix, x = (
        Circulant(jnp.asarray(np.random.default_rng(0).normal(size=12)), shape=(12, 5)),
        jnp.ones(12, jnp.float32),
    )
    y = matrix.apply(x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.asarray(matrix.apply(x.astype(jnp.float64)), np.float32))


def test_nearest_of_a_half_precision_matrix_is_float32():
    assert Circulant.nearest(jnp.ones((4, 3), jnp.bfloat16)).c.dtype == jnp.float32
