"""Compare `Circulant` and `CirculantPair` with matrices from `scipy.linalg.circulant`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import Circulant, CirculantPair
from tests.structured.cases import ProjectionContract, assert_close


def paper_circulant(c: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the top-left block, of the given shape, of `W^T`, where `W = Z_1(c)` is the paper's circulant matrix."""
    return scipy.linalg.circulant(c).T[: shape[0], : shape[1]]


class TestCirculant(ProjectionContract):
    family = Circulant

    def dense(self, arrays, shape):
        return paper_circulant(arrays["c"], shape)


class TestCirculantPair(ProjectionContract):
    family = CirculantPair

    def dense(self, arrays, shape):
        return paper_circulant(arrays["r1"], shape) * paper_circulant(arrays["r2"], shape)


def test_orientation():
    # M maps 2 features to 3, so N = 3. Row i of M is c, cyclically shifted to the right by i places.
    matrix = Circulant(jnp.array([1.0, 2.0, 3.0]), shape=(2, 3))
    np.testing.assert_array_equal(matrix.to_dense(), [[1, 2, 3], [3, 1, 2]])
    np.testing.assert_allclose(matrix.apply(jnp.array([1.0, 10.0])), [31, 12, 23], rtol=1e-6)
    np.testing.assert_allclose(matrix.T.apply(jnp.array([1.0, 10.0, 100.0])), [321, 213], rtol=1e-6)


def test_first_column_of_the_papers_matrix_is_c():
    c = jnp.array([1.0, 2.0, 3.0, 4.0])
    W = Circulant(c, shape=(4, 4)).to_dense().T
    np.testing.assert_array_equal(W[:, 0], c)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [2, 7])
def test_circulants_commute_and_multiply_to_a_circulant(n):
    rng = np.random.default_rng(0)
    C, D = (Circulant(jnp.asarray(rng.normal(size=n)), shape=(n, n)) for _ in range(2))
    product = D.apply(C.to_dense())
    assert_close(product, C.apply(D.to_dense()))
    assert_close(product, Circulant.nearest(product).to_dense())


@pytest.mark.usefixtures("x64")
def test_singular_values_are_the_absolute_spectrum():
    c = np.random.default_rng(0).normal(size=12)
    singular = np.linalg.svd(Circulant(jnp.asarray(c), shape=(12, 12)).to_dense(), compute_uv=False)
    assert_close(singular, np.sort(np.abs(np.fft.fft(c)))[::-1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("family", [Circulant, CirculantPair])
def test_nearest_is_the_mean_of_each_wrapped_diagonal(shape, family):
    target = np.random.default_rng(0).normal(size=shape)
    N = max(shape)
    diagonals = [[target[i, j] for i in range(shape[0]) for j in range(shape[1]) if (j - i) % N == k] for k in range(N)]
    assert_close(family.nearest(jnp.asarray(target)).compact().c, [np.mean(d) for d in diagonals])


@pytest.mark.parametrize(("shape", "single"), [((768, 768), 768), ((768, 3072), 3072), ((5, 3), 5)], ids=str)
def test_numbers_held(shape, single):
    def abstract(family):
        return jax.eval_shape(lambda: family.init(jax.random.key(0), shape, scale=1.0))

    assert abstract(Circulant).num_params == single
    assert abstract(CirculantPair).num_params == 2 * single
    fused = jax.eval_shape(lambda pair: pair.compact(), abstract(CirculantPair))
    assert type(fused) is Circulant and fused.num_params == single


def test_the_pair_starts_with_r1_zero_and_r2_random():
    pair = CirculantPair.init(jax.random.key(0), (8, 8), scale=0.5)
    assert not np.any(pair.r1)
    np.testing.assert_array_equal(pair.r2, 0.5 * jax.random.normal(jax.random.key(0), (8,)))


def test_the_nearest_pair_can_learn_every_number():
    pair = CirculantPair.nearest(jnp.zeros((4, 4)))
    grad = jax.grad(lambda m: jnp.sum(m.apply(jnp.array([1.0, 2.0, 4.0, 8.0]))))(pair)
    assert np.all((np.asarray(grad.r1) != 0) | (np.asarray(grad.r2) != 0))


@pytest.mark.parametrize("shape", [(4, 4), (4, 3), (3, 4)], ids=str)
def test_wrong_number_of_numbers_names_both(shape):
    with pytest.raises(UserError, match=r"Circulant: c must have shape \(4,\), not \(5,\)"):
        Circulant(jnp.ones(5), shape=shape)
    with pytest.raises(UserError, match=r"CirculantPair: r2 must have shape \(4,\), not \(3,\)"):
        CirculantPair(jnp.ones(4), jnp.ones(3), shape=shape)
    with pytest.raises(UserError, match="two positive integers, not 4"):
        Circulant(jnp.ones(4), shape=4)


def test_near_names_are_offered():
    pair = CirculantPair.init(jax.random.key(0), (4, 4), scale=1.0)
    with pytest.raises(UserError, match=r"no array 'r3'; did you mean 'r[12]' or 'r[12]'"):
        pair.with_arrays(r3=jnp.ones(4))
