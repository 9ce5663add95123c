"""Compare skew-circulant and f-circulant matrices with matrices from `scipy.linalg.toeplitz`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import Circulant, FCirculant, SkewCirculant
from tests.structured.cases import ProjectionContract, assert_close

FACTORS = [0.0, 1e-12, 0.3, -2.5, 1.0, -1.0]


def paper_f_circulant(v: np.ndarray, f: float) -> np.ndarray:
    """Return `Z_f(v)` of the paper, with the first column v and the first row `v[0], f v[N-1], ..., f v[1]`."""
    return scipy.linalg.toeplitz(v, np.concatenate([v[:1], f * v[:0:-1]]))


def cut(W: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return W.T[: shape[0], : shape[1]]


class TestSkewCirculant(ProjectionContract):
    family = SkewCirculant

    def dense(self, arrays, shape):
        return cut(paper_f_circulant(arrays["v"], -1), shape)


class TestFCirculant(ProjectionContract):
    family = FCirculant

    def options(self, shape):
        return {"f": 0.7}

    def example(self):
        return FCirculant.random((8, 8), f=0.7)

    def dense(self, arrays, shape):
        return cut(paper_f_circulant(arrays["v"], 0.7), shape)


def test_orientation():
    # M maps 2 features to 3, so N = 3. Entries that wrap around are multiplied by f.
    matrix = FCirculant(jnp.array([1.0, 2.0, 3.0]), shape=(2, 3), f=10.0)
    np.testing.assert_array_equal(matrix.to_dense(), [[1, 2, 3], [30, 1, 2]])
    np.testing.assert_allclose(matrix.apply(jnp.array([1.0, 10.0])), [301, 12, 23], rtol=1e-6)
    np.testing.assert_allclose(matrix.T.apply(jnp.array([1.0, 10.0, 100.0])), [321, 240], rtol=1e-6)
    skew = SkewCirculant(jnp.array([1.0, 2.0, 3.0]), shape=(2, 3))
    np.testing.assert_array_equal(skew.to_dense(), [[1, 2, 3], [-3, 1, 2]])
    np.testing.assert_allclose(skew.apply(jnp.array([1.0, 10.0])), [-29, 12, 23], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(6, 6), (7, 7), (3, 8), (8, 3)], ids=str)
def test_every_factor_in_both_directions(shape):
    rng = np.random.default_rng(0)
    v, x = rng.normal(size=max(shape)), rng.normal(size=(2, shape[0]))
    matrices = [
        FCirculant(jnp.asarray(v), shape=shape, f=f, transposed=transposed)
        for f in FACTORS
        for transposed in (False, True)
    ]
    results = jax.jit(lambda matrices, x: [(m.apply(x), m.to_dense(), m.T.to_dense()) for m in matrices])(matrices, x)
    for matrix, (y, dense, transpose) in zip(matrices, results, strict=True):
        W = paper_f_circulant(v, matrix.f)
        M = cut(W.T if matrix.transposed else W, shape)
        assert_close(y, x @ M)
        assert_close(dense, M)
        assert_close(transpose, M.T)


@pytest.mark.usefixtures("x64")
def test_named_factors():
    v = np.random.default_rng(0).normal(size=5)
    dense = {f: FCirculant(jnp.asarray(v), shape=(5, 4), f=f).to_dense() for f in (1, -1, 0)}
    assert_close(dense[1], Circulant(jnp.asarray(v), shape=(5, 4)).to_dense())
    assert_close(dense[-1], SkewCirculant(jnp.asarray(v), shape=(5, 4)).to_dense())
    assert_close(dense[0], np.triu(scipy.linalg.toeplitz(v))[:, :4])


@pytest.mark.usefixtures("x64")
def test_a_factor_of_one_costs_one_convolution():
    def ffts(f):
        matrix = FCirculant(jnp.ones(8), shape=(8, 8), f=f)
        return jax.jit(type(matrix).apply).lower(matrix, jnp.ones((3, 8))).as_text().count("stablehlo.fft ")

    assert (ffts(1.0), ffts(-1.0), ffts(0.0)) == (3, 3, 6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [2, 7, 8])
@pytest.mark.parametrize("f", [0.0, 0.3, -1.0])
def test_f_circulants_commute_and_multiply_to_an_f_circulant(n, f):
    rng = np.random.default_rng(0)
    A, B = (FCirculant(jnp.asarray(rng.normal(size=n)), shape=(n, n), f=f) for _ in range(2))
    product = B.apply(A.to_dense())
    assert_close(product, A.apply(B.to_dense()))
    assert_close(product, FCirculant.nearest(product, f=f).to_dense())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [12, 13])
def test_singular_values_of_a_skew_circulant_are_its_polynomial_at_the_roots_of_minus_one(n):
    v = np.random.default_rng(0).normal(size=n)
    singular = np.linalg.svd(SkewCirculant(jnp.asarray(v), shape=(n, n)).to_dense(), compute_uv=False)
    roots = np.exp(1j * np.pi * (2 * np.arange(n) + 1) / n)
    assert_close(singular, np.sort(np.abs(np.polynomial.polynomial.polyval(roots, v)))[::-1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3), (1, 4), (4, 1)], ids=str)
def test_nearest_is_the_least_squares_solution(shape):
    target, N = np.random.default_rng(0).normal(size=shape), max(shape)
    found = jax.jit(lambda target: [FCirculant.nearest(target, f=f).v for f in FACTORS])(target)
    for f, v in zip(FACTORS, found, strict=True):
        basis = np.stack([cut(paper_f_circulant(unit, f), shape).ravel() for unit in np.eye(N)], axis=1)
        # `lstsq` returns the solution of smallest norm. So a parameter on which no entry of the matrix depends is 0.
        assert_close(v, np.linalg.lstsq(basis, target.ravel(), rcond=1e-14)[0])


@pytest.mark.parametrize("f", [1e-30, 1e30])
def test_nearest_for_factors_whose_square_is_out_of_range(f):
    matrix = FCirculant(jnp.array([1.0, 2.0, 3.0]), shape=(2, 3), f=f)
    np.testing.assert_allclose(FCirculant.nearest(matrix.to_dense(), f=f).v, matrix.v, rtol=1e-6)
    # This target is not in the family. Each entry of a matrix depends on a single parameter, so the basis matrices are
    # orthogonal, and a projection onto each of them, in float64, gives the least-squares solution.
    target = np.asarray(matrix.to_dense().T, np.float64).ravel()
    basis = np.stack([cut(paper_f_circulant(unit, 1 / f), (3, 2)).ravel() for unit in np.eye(3)])
    assert (np.count_nonzero(basis, axis=0) == 1).all()
    found = FCirculant.nearest(matrix.to_dense().T, f=1 / f).v
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, basis @ target / np.sum(basis**2, axis=1), rtol=1e-6)


def test_the_factor_is_structure():
    a, b = (FCirculant(jnp.ones(3), shape=(3, 3), f=f) for f in (0.5, 0.25))
    assert jax.tree.structure(a) != jax.tree.structure(b) and list(a.arrays()) == ["v"]
    assert a.T.T.transposed is False and a.T.shape == (3, 3) and a.T.f == 0.5


@pytest.mark.parametrize("f", [float("nan"), float("inf"), "small", 1j])
def test_impossible_factor(f):
    with pytest.raises(UserError, match="FCirculant: f must be"):
        FCirculant.init(jax.random.key(0), (3, 3), scale=1.0, f=f)
    with pytest.raises(UserError, match="FCirculant: f must be"):
        FCirculant.nearest(jnp.ones((3, 3)), f=f)


def test_wrong_number_of_numbers_names_both():
    with pytest.raises(UserError, match=r"SkewCirculant: v must have shape \(4,\), not \(5,\)"):
        SkewCirculant(jnp.ones(5), shape=(4, 3))
    with pytest.raises(UserError, match=r"FCirculant: v must have shape \(4,\), not \(3,\)"):
        FCirculant(jnp.ones(3), shape=(4, 3), f=0.0)
