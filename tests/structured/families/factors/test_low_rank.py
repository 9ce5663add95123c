"""Compare `LowRank` with sums of `numpy.outer`, and `nearest` with `numpy.linalg.svd`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import LowRank, matmul, updated_matmul
from tests.structured.cases import ProjectionContract, assert_close


class TestLowRank(ProjectionContract):
    family = LowRank

    def options(self, shape):
        return {"rank": min(2, *shape)}

    def dense(self, arrays, shape):
        pairs = zip(arrays["down"].T, arrays["up"], strict=True)
        return sum(np.outer(column, row) for column, row in pairs)


def test_orientation():
    # M maps 2 features to 3.
    matrix = LowRank(down=jnp.array([[1.0], [10.0]]), up=jnp.array([[1.0, 2.0, 3.0]]))
    assert matrix.shape == (2, 3)
    np.testing.assert_array_equal(matrix.to_dense(), [[1, 2, 3], [10, 20, 30]])
    np.testing.assert_array_equal(matrix.apply(jnp.array([1.0, 0.0])), [1, 2, 3])
    np.testing.assert_array_equal(matrix.T.apply(jnp.array([1.0, 0.0, 0.0])), [1, 10])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 4), (4, 7), (7, 4)], ids=str)
def test_nearest_leaves_the_singular_values_beyond_the_rank(shape, rank):
    target = np.random.default_rng(0).normal(size=shape)
    found = jax.jit(LowRank.nearest, static_argnames="rank")(target, rank=rank)
    singular = np.linalg.svd(target, compute_uv=False)
    error = np.linalg.norm(target - np.asarray(found.down) @ np.asarray(found.up))
    assert abs(error - np.linalg.norm(singular[rank:])) < 1e-10
    assert_close(np.linalg.svd(np.asarray(found.down) @ np.asarray(found.up), compute_uv=False)[:rank], singular[:rank])


def test_the_nearest_to_zero_can_learn():
    found = LowRank.nearest(jnp.zeros((4, 3)), rank=2)
    np.testing.assert_allclose(found.down.T @ found.down, np.eye(2), atol=1e-6)


@pytest.mark.parametrize(("shape", "rank", "numbers"), [((768, 768), 1, 1536), ((768, 3072), 4, 15360)], ids=str)
def test_numbers_held(shape, rank, numbers):
    matrix = jax.eval_shape(lambda: LowRank.init(jax.random.key(0), shape, scale=1.0, rank=rank))
    assert matrix.num_params == numbers and matrix.rank == rank and matrix.compact() is matrix


def test_starts_with_up_zero_and_down_random():
    matrix = LowRank.init(jax.random.key(0), (5, 3), scale=0.5, rank=2)
    assert matrix.up.shape == (2, 3) and not np.any(matrix.up)
    np.testing.assert_array_equal(matrix.down, 0.5 * jax.random.normal(jax.random.key(0), (5, 2)))


@pytest.mark.parametrize("rank", [0, -1, 4, 1.0])
def test_impossible_rank_names_both_numbers(rank):
    with pytest.raises(UserError, match=f"a 5 x 3 matrix has a rank from 1 to 3, but {rank} was asked for"):
        LowRank.init(jax.random.key(0), (5, 3), scale=1.0, rank=rank)
    with pytest.raises(UserError, match=f"a 5 x 3 matrix has a rank from 1 to 3, but {rank} was asked for"):
        LowRank.nearest(jnp.ones((5, 3)), rank=rank)


def test_factors_that_do_not_fit():
    with pytest.raises(UserError, match=r"up must have shape \(3, 4\), not \(2, 4\)"):
        LowRank(down=jnp.ones((5, 3)), up=jnp.ones((2, 4)))
    with pytest.raises(UserError, match="a 2 x 2 matrix has a rank from 1 to 2, but 3 was asked for"):
        LowRank(down=jnp.ones((2, 3)), up=jnp.ones((3, 2)))
    with pytest.raises(UserError, match=r"up must be an array of shape \(r, out_features\)"):
        LowRank(down=jnp.ones((2, 1)), up=jnp.ones(2))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_beside_an_input_only_small_arrays_are_kept_for_its_gradients(precision):
    x, kernel = jnp.ones((6, 8), precision), jnp.ones((8, 7), precision)
    matrix = LowRank.init(jax.random.key(0), (8, 7), scale=1.0, rank=1)
    for apply in (
        lambda x, matrix: matmul(x, matrix, execution="fft"),
        lambda x, matrix: updated_matmul(x, kernel, matrix, execution="fft"),
    ):
        _, pull = jax.vjp(apply, x, matrix)
        kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
        assert [leaf.dtype for leaf in kept] == [x.dtype]
