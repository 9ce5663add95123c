"""Compare `LowRankKronecker` with `numpy.kron`, and test how near to its target the search of `nearest` comes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import Kronecker, LowRankKronecker, near_square_factors
from tests.speeds import fast
from tests.structured.cases import StructuredMatrixContract, assert_close


def paper_W(A, down, up):
    """Return the matrix `W` of the papers, the transpose of the sum of all `A_k (x) (down_k up_k)`.

    Its factors are the transposes of the factors of the sum.
    """
    return sum(np.kron(a.T, v.T @ u.T) for a, u, v in zip(A, down, up, strict=True))


class TestLowRankKronecker(StructuredMatrixContract):
    family = LowRankKronecker

    def options(self, shape):
        (m1, n1), (m2, n2) = near_square_factors(shape)
        return {"rank": min(2, m2, n2), "terms": min(2, m1 * n1, m2 * n2)}

    def nearest_options(self, shape):
        return {**self.options(shape), "steps": 0}

    def dense(self, arrays, shape):
        return paper_W(**arrays).T


FACTORS = ((3, 2), (4, 5))


def draw(terms, rank, factors=FACTORS, seed=0):
    (m1, n1), (m2, n2) = factors
    rng = np.random.default_rng(seed)
    shapes = (terms, m1, n1), (terms, m2, rank), (terms, rank, n2)
    return LowRankKronecker(*(jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes))


def error(matrix, target):
    return np.linalg.norm(np.asarray(target, np.float64) - paper_W(*map(np.asarray, matrix.arrays().values())).T)


def test_orientation():
    # A has the shape (1, 2), and the second factor has the shape (2, 1). So M maps 2 features to 2.
    matrix = LowRankKronecker(A=jnp.array([[[1.0, 2.0]]]), down=jnp.array([[[1.0], [10.0]]]), up=jnp.array([[[3.0]]]))
    assert matrix.shape == (2, 2) and matrix.factor_shapes == ((1, 2), (2, 1))
    np.testing.assert_array_equal(matrix.to_dense(), [[3, 6], [30, 60]])
    np.testing.assert_array_equal(matrix.apply(jnp.array([1.0, 0.0])), [3, 6])
    np.testing.assert_array_equal(matrix.T.apply(jnp.array([1.0, 0.0])), [3, 30])


def test_numbers_of_the_methods_that_use_it():
    def count(shape, **options):
        return jax.eval_shape(lambda: LowRankKronecker.init(jax.random.key(0), shape, scale=1.0, **options)).num_params

    # LoKr has one Kronecker product. Here its factors are 24 x 24 and 32 x 32, and the second factor has rank 4.
    assert count((768, 768), rank=4, factor_shapes=((24, 24), (32, 32))) == 24**2 + 4 * (32 + 32)
    # Compacter and KAdaptation have k = 4 Kronecker products, with first factors of 4 x 4 and second factors of rank 1.
    assert count((768, 3072), rank=1, terms=4, factor_shapes=((4, 4), (192, 768))) == 4 * (16 + 192 + 768)
    assert count((768, 768), rank=2) == 32 * 24 + 2 * (24 + 32)


@pytest.mark.parametrize(("rank", "fewer"), [(1, False), (2, False), (3, True), (4, True)])
def test_fused_is_the_kronecker_where_that_holds_fewer_numbers(rank, fewer):
    # Each B has 20 entries. With rank r, `down` and `up` have 9 r parameters for each term.
    matrix = draw(2, rank)
    fused = matrix.compact()
    assert isinstance(fused, Kronecker) == fewer and (fused is matrix) == (not fewer)
    assert fused.num_params == 2 * (6 + min(20, 9 * rank))
    assert_close(fused.to_dense(), paper_W(*map(np.asarray, matrix.arrays().values())).T, "float32")


def test_starts_with_A_zero_and_down_and_up_random():
    matrix = LowRankKronecker.init(jax.random.key(0), (600, 400), scale=0.5, rank=8, terms=3)
    assert matrix.A.shape == (3, 25, 20) and matrix.down.shape == (3, 24, 8) and matrix.up.shape == (3, 8, 20)
    assert not np.any(matrix.A)
    assert np.std(matrix.down) == pytest.approx(0.5, rel=0.1) and np.std(matrix.up) == pytest.approx(0.5, rel=0.1)
    assert abs(np.corrcoef(np.ravel(matrix.down)[:480], np.ravel(matrix.up)[:480])[0, 1]) < 0.2


def test_nearest_to_one_product_needs_no_step():
    target = draw(1, 2).to_dense()
    found = LowRankKronecker.nearest(target, rank=2, factor_shapes=FACTORS, steps=0)
    assert_close(found.to_dense(), target, "float32")
    leaves = [np.linalg.norm(leaf) for leaf in found.arrays().values()]
    assert leaves[0] == pytest.approx(np.linalg.norm(found.down[0] @ found.up[0]), rel=1e-5)
    assert leaves[1] == pytest.approx(leaves[2], rel=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_start_is_the_optimum_of_kronecker_with_every_B_truncated():
    target = np.random.default_rng(0).normal(size=(12, 10))
    full = Kronecker.nearest(target, terms=3, factor_shapes=FACTORS)
    expected = 0
    for a, b in zip(np.asarray(full.A), np.asarray(full.B), strict=True):
        U, S, Vt = np.linalg.svd(b)
        expected = expected + np.kron(a, U[:, :2] * S[:2] @ Vt[:2])
    start = LowRankKronecker.nearest(target, terms=3, rank=2, factor_shapes=FACTORS, steps=0)
    assert_close(start.to_dense(), expected)
    # At full rank the start is the result of `Kronecker.nearest`, which is already the optimum.
    whole = LowRankKronecker.nearest(target, terms=3, rank=4, factor_shapes=FACTORS, steps=0)
    assert_close(whole.to_dense(), full.to_dense())


@pytest.mark.exhaustive
def test_the_search_is_better_than_its_start_and_finds_a_member_again():
    target = draw(2, 1).to_dense()
    near = [LowRankKronecker.nearest(target, rank=1, terms=2, factor_shapes=FACTORS, steps=steps) for steps in (0, 200)]
    start, found = (error(matrix, target) / np.linalg.norm(target) for matrix in near)
    assert start > 0.05 and found < 1e-3
    noise = np.random.default_rng(1).normal(size=(12, 10)).astype(np.float32)
    near = [LowRankKronecker.nearest(noise, rank=1, terms=2, factor_shapes=FACTORS, steps=steps) for steps in (0, 200)]
    start, found = (error(matrix, noise) / np.linalg.norm(noise) for matrix in near)
    assert found < start - 0.01 and start < 1


def test_the_search_does_not_depend_on_the_size_of_the_target():
    noise = np.random.default_rng(1).normal(size=(12, 10)).astype(np.float32)
    errors = [
        error(
            LowRankKronecker.nearest(jnp.asarray(scale * noise), rank=1, terms=2, factor_shapes=FACTORS), scale * noise
        )
        / (scale * np.linalg.norm(noise))
        for scale in np.float32([1e-20, 1, 1e20])
    ]
    np.testing.assert_allclose(errors, errors[1], rtol=0.01)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", fast(["zero", "one product of rank 1"], "one product of rank 1"))
def test_what_the_target_leaves_empty_can_still_learn(target):
    dense = jnp.zeros((12, 10)) if target == "zero" else draw(1, 1).to_dense()
    found = LowRankKronecker.nearest(dense, rank=3, terms=2, factor_shapes=FACTORS, steps=20)
    assert_close(np.asarray(found.to_dense()) + 1, np.asarray(dense) + 1, "float32")
    # M is the product of A, `down` and `up`. If two of them are zero, all three gradients are zero. So `down @ up` must
    # not be zero where A is zero. For each index i of the rank, column i of `down` or row i of `up` must not be zero.
    for k, i in itertools.product(range(2), range(3)):
        assert np.linalg.norm(found.down[k, :, i]) + np.linalg.norm(found.up[k, i]) > 0.1
        assert np.linalg.norm(found.down[k] @ found.up[k]) > 0.1
    # So plain gradient descent that starts at this matrix reaches another matrix of the family.
    other = draw(2, 3, seed=5).to_dense() / 10

    def loss(matrix):
        return jnp.sum(jnp.square(matrix.to_dense() - other))

    def step(_, matrix):
        return jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, matrix, jax.grad(loss)(matrix))

    reached = jax.jit(lambda matrix: loss(jax.lax.fori_loop(0, 2000, step, matrix)))(found)
    assert reached < 0.01 * jnp.sum(jnp.square(other))


def test_nearest_to_numbers_that_are_not_finite():
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(UserError, match="the target holds numbers that are not finite"):
            LowRankKronecker.nearest(jnp.zeros((12, 10)).at[1, 1].set(bad), rank=1, factor_shapes=FACTORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "a 4 x 5 matrix has a rank from 1 to 4, but 0 was asked for"),
        ({"rank": 5}, "a 4 x 5 matrix has a rank from 1 to 4, but 5 was asked for"),
        ({"rank": 1.0}, "a 4 x 5 matrix has a rank from 1 to 4, but 1.0 was asked for"),
        ({"rank": 1, "terms": 7}, r"LowRankKronecker: 6 terms of 3 x 2 \(x\) 4 x 5 .*from 1 to 6"),
        (
            {"rank": 1, "factor_shapes": ((3, 2), (5, 4))},
            "LowRankKronecker: factors of 3 x 2 and 5 x 4 multiply to 15 x 8",
        ),
    ],
    ids=str,
)
def test_impossible_sizes(options, message):
    options = {"factor_shapes": FACTORS, **options}
    with pytest.raises(UserError, match=message):
        LowRankKronecker.init(jax.random.key(0), (12, 10), scale=1.0, **options)
    with pytest.raises(UserError, match=message):
        LowRankKronecker.nearest(jnp.ones((12, 10)), **options)


def test_arrays_that_do_not_fit():
    A, down, up = draw(2, 3).arrays().values()
    with pytest.raises(UserError, match=r"up must have shape \(2, 3, 5\), not \(2, 2, 5\)"):
        LowRankKronecker(A=A, down=down, up=up[:, :2])
    with pytest.raises(UserError, match=r"down must have shape \(2, 4, 3\), not \(1, 4, 3\)"):
        LowRankKronecker(A=A, down=down[:1], up=up)
    with pytest.raises(UserError, match=r"A must be an array of shape \(k, m1, n1\), not \(3, 2\)"):
        LowRankKronecker(A=A[0], down=down, up=up)
    with pytest.raises(UserError, match="a 4 x 5 matrix has a rank from 1 to 4, but 5 was asked for"):
        LowRankKronecker(A=A, down=jnp.ones((2, 4, 5)), up=jnp.ones((2, 5, 5)))
