"""Tests of `Placed`, which puts a structured matrix as a block into a larger matrix of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import FAMILIES, Circulant, CirculantPair, LowRank, Placed, Sum
from tests.structured.cases import MatrixContract, assert_close


def placed_block(shape):
    """Return the shape and offset of the block for a `Placed` matrix of this shape.

    It covers all rows but the first and all columns but the last, or the only row or column.
    """
    m, n = shape
    return (max(1, m - 1), max(1, n - 1)), (min(1, m - 1), 0)


class TestPlaced(MatrixContract):
    family = Placed

    def abstract(self, shape):
        block, offset = placed_block(shape)
        return jax.eval_shape(lambda: Placed(CirculantPair.init(jax.random.key(0), block, scale=1.0), shape, offset))

    def dense(self, arrays, shape):
        (rows, columns), (row, column) = placed_block(shape)
        result = np.zeros(shape)
        block = scipy.linalg.circulant(arrays["matrix_r1"] * arrays["matrix_r2"]).T[:rows, :columns]
        result[row : row + rows, column : column + columns] = block
        return result

    def path(self, name):
        return name.replace("matrix_", ".matrix.")

    def field(self, name):
        return name.removeprefix("matrix_")


def test_orientation():
    matrix = Placed(Circulant(jnp.array([1.0, 2.0]), (2, 2)), (3, 5), (1, 2))
    np.testing.assert_array_equal(matrix.to_dense(), [[0, 0, 0, 0, 0], [0, 0, 1, 2, 0], [0, 0, 2, 1, 0]])
    np.testing.assert_array_equal(matrix.apply(jnp.array([5.0, 1.0, 0.0])), [0, 0, 1, 2, 0])
    np.testing.assert_array_equal(matrix.T.apply(jnp.array([7.0, 7.0, 1.0, 10.0, 7.0])), [0, 21, 12])


@pytest.mark.usefixtures("x64")
def test_blocks_of_a_fused_kernel_sum_to_what_they_are_apart():
    rng = np.random.default_rng(0)
    query, value = (
        Circulant(jnp.asarray(rng.normal(size=6)), (6, 4)),
        LowRank(jnp.asarray(rng.normal(size=(6, 2))), jnp.asarray(rng.normal(size=(2, 4)))),
    )
    fused = Sum((Placed(query, (6, 12), (0, 0)), Placed(value, (6, 12), (0, 8))))
    x = rng.normal(size=(5, 6))
    assert_close(fused.apply(x), np.hstack([query.apply(x), np.zeros((5, 4)), value.apply(x)]))
    assert list(fused.arrays()) == ["terms_0_matrix_c", "terms_1_matrix_down", "terms_1_matrix_up"]


def test_the_block_is_fused_and_multiplied_in_its_place():
    pair = CirculantPair(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), (2, 2))
    matrix = Placed(pair, (2, 4), (0, 2))
    fused, twice = matrix.compact(), matrix.absorb(2.0)
    assert isinstance(fused, Placed) and type(fused.matrix) is Circulant and fused.num_params == 2
    assert isinstance(twice, Placed) and twice.offset == (0, 2)
    np.testing.assert_array_equal(fused.to_dense(), [[0, 0, 3, 8], [0, 0, 8, 3]])
    np.testing.assert_array_equal(twice.to_dense(), [[0, 0, 6, 16], [0, 0, 16, 6]])
    assert Placed not in FAMILIES.values()


def test_it_is_lean_where_its_block_is():
    assert Placed(LowRank(jnp.ones((2, 1)), jnp.ones((1, 2))), (2, 4), (0, 0)).small_residuals
    assert not Placed(Circulant(jnp.ones(2), (2, 2)), (2, 4), (0, 0)).small_residuals


@pytest.mark.parametrize(("shape", "offset"), [((2, 3), (0, 2)), ((3, 3), (2, 0)), ((3, 3), (-1, 0)), ((1, 9), (0, 0))])
def test_a_block_that_sticks_out(shape, offset):
    message = rf"a block of 2 x 2 at \({offset[0]}, {offset[1]}\) does not lie within {shape[0]} x {shape[1]}"
    with pytest.raises(UserError, match=message):
        Placed(Circulant(jnp.ones(2), (2, 2)), shape, offset)


def test_what_is_no_block():
    with pytest.raises(UserError, match="Placed: matrix must be a structured matrix"):
        Placed(jnp.ones((2, 2)), (3, 3), (0, 0))
    with pytest.raises(UserError, match="Placed: shape must be"):
        Placed(Circulant(jnp.ones(2), (2, 2)), (3,), (0, 0))
