"""Compare `Dense`, the family of all matrices, with NumPy arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import Dense
from tests.structured.cases import ProjectionContract


class TestDense(ProjectionContract):
    family = Dense

    def dense(self, arrays, shape):
        return arrays["W"]


def test_orientation():
    # M maps 2 features to 3.
    matrix = Dense(jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
    assert matrix.shape == (2, 3)
    np.testing.assert_array_equal(matrix.apply(jnp.array([1.0, 0.0])), [1, 2, 3])
    np.testing.assert_array_equal(matrix.T.apply(jnp.array([1.0, 0.0, 0.0])), [1, 10])


def test_it_holds_every_number_and_nothing_can_be_saved():
    matrix = jax.eval_shape(lambda: Dense.init(jax.random.key(0), (768, 3072), scale=1.0))
    assert matrix.num_params == 768 * 3072 and matrix.compact() is matrix


def test_nearest_is_the_target_itself():
    target = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), "float32")
    np.testing.assert_array_equal(Dense.nearest(target).W, target)


def test_shapes_are_told_apart_by_the_array():
    # The shape is not part of the structure, so without their arrays two matrices of different shapes are equal.
    small, large = Dense(jnp.ones((2, 3))), Dense(jnp.ones((4, 5)))
    assert small.with_arrays(W=None) == large.with_arrays(W=None)
    assert small.with_arrays(W=large.W).shape == (4, 5)


@pytest.mark.parametrize("wrong", [jnp.ones(3), jnp.ones((1, 2, 3)), 1.0])
def test_what_is_no_matrix(wrong):
    with pytest.raises(UserError, match=r"Dense: W must be an array of shape \(in_features, out_features\), not"):
        Dense(wrong)
