"""Compare ranks, determinants and condition numbers with those that NumPy computes from dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import (
    Circulant,
    CirculantPair,
    FCirculant,
    LowRank,
    SkewCirculant,
    condition_number,
    displacement_rank,
    log_determinant,
    numerical_rank,
    singular_values,
)
from tests.structured.cases import assert_close


def shift(n: int, f: float) -> np.ndarray:
    """Return the n x n matrix `Z_f` of arXiv 2406.17740.

    It has ones directly below the diagonal and f in the upper right corner.
    """
    Z = np.diag(np.ones(n - 1), -1)
    Z[0, -1] += f
    return Z


def paper_f_circulant(v: np.ndarray, f: float) -> np.ndarray:
    """Return the f-circulant matrix `Z_f(v)` of arXiv 2406.17740, the sum of `v[k]` times the kth power of `Z_f`."""
    return sum(v[k] * np.linalg.matrix_power(shift(len(v), f), k) for k in range(len(v)))


def members(n: int, seed: int = 0):
    """Return random n x n structured matrices, each with the dense matrix that NumPy computes for it.

    For the first five, the code under test computes eigenvalues by an FFT, and for the last two it uses the dense form.
    For n > 1, only the last matrix is singular.
    """
    u, v = np.random.default_rng(seed).normal(size=(2, n))
    with jax.enable_x64(True):
        return [
            (Circulant(jnp.asarray(v), shape=(n, n)), paper_f_circulant(v, 1.0).T),
            (CirculantPair(jnp.asarray(u), jnp.asarray(v), shape=(n, n)), paper_f_circulant(u * v, 1.0).T),
            (SkewCirculant(jnp.asarray(v), shape=(n, n)), paper_f_circulant(v, -1.0).T),
            (FCirculant(jnp.asarray(v), shape=(n, n), f=1.0, transposed=True), paper_f_circulant(v, 1.0)),
            (FCirculant(jnp.asarray(v), shape=(n, n), f=-1.0, transposed=False), paper_f_circulant(v, -1.0).T),
            (FCirculant(jnp.asarray(v), shape=(n, n), f=0.5, transposed=False), paper_f_circulant(v, 0.5).T),
            (LowRank(down=jnp.asarray(u[:, None]), up=jnp.asarray(v[None])), np.outer(u, v)),
        ]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_square_matrices(n):
    signs = set()
    for seed in range(3):
        *regular, singular = members(n, seed)
        for matrix, M in regular:
            assert_close(singular_values(matrix), np.linalg.svd(M, compute_uv=False))
            assert_close(condition_number(matrix), np.linalg.cond(M))
            assert_close(log_determinant(matrix), np.linalg.slogdet(M))
            assert numerical_rank(matrix) == n
            signs.add(log_determinant(matrix)[0])
        assert numerical_rank(singular[0]) == 1
    assert signs == {-1.0, 1.0}


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4)], ids=str)
def test_rectangular_matrices_have_singular_values_and_a_rank(shape):
    c = np.random.default_rng(0).normal(size=max(shape)).astype(np.float32)
    M = np.asarray(scipy.linalg.circulant(c).T[: shape[0], : shape[1]], np.float64)
    matrix = Circulant(jnp.asarray(c), shape=shape)
    assert_close(singular_values(matrix), np.linalg.svd(M, compute_uv=False))
    assert numerical_rank(matrix) == min(shape)
    for function in (condition_number, log_determinant):
        for each in (matrix, M):
            with pytest.raises(UserError, match=f"{function.__name__} is .* square .* is {shape[0]} x {shape[1]}"):
                function(each)


def test_circulants_are_never_formed():
    n = 2**17  # The dense matrix would take 137 GB in float64.
    c = np.zeros(n, np.float32)
    c[:2] = 3.0, 1.0
    matrix = CirculantPair(jnp.asarray(c), jnp.ones(n), shape=(n, n))
    assert numerical_rank(matrix) == n
    assert condition_number(matrix) == pytest.approx(2.0)
    # The determinant is 3^n - (-1)^n. Its logarithm, rounded to float64, equals that of 3^n.
    assert log_determinant(matrix) == (1.0, pytest.approx(n * np.log(3.0)))


@pytest.mark.parametrize("zeros", [1, 3, 5])
def test_the_rank_of_a_circulant_is_its_number_of_non_zero_frequencies(zeros):
    spectrum = np.ones(7) + np.arange(7)
    # These are the 7 values of a real FFT of length 12. In the complex FFT, which has 12 values, each of these values
    # occurs twice, except the first and the last.
    spectrum[:zeros] = 0
    c = np.fft.irfft(spectrum, n=12)
    matrix = Circulant(jnp.asarray(c, jnp.float32), shape=(12, 12))
    # After rounding to float32, the zeros are no longer exactly zero.
    assert singular_values(matrix)[-1] > 0
    assert numerical_rank(matrix) == 12 - (2 * zeros - 1)
    assert numerical_rank(matrix, rtol=1e-15) == 12
    assert numerical_rank(matrix.to_dense()) == 12 - (2 * zeros - 1)


def test_ranks_of_other_matrices():
    rng = np.random.default_rng(0)
    A, B = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (20, 30))
    low_rank = LowRank(down=B, up=A.T)
    assert numerical_rank(low_rank) == numerical_rank(low_rank.to_dense()) == 3
    assert numerical_rank(low_rank.with_arrays(up=A.T.astype(jnp.bfloat16))) == 3
    circulant = Circulant(jnp.asarray(rng.normal(size=30), jnp.float32), shape=(30, 30))
    assert numerical_rank(circulant @ low_rank) == 3
    assert numerical_rank(circulant - low_rank @ low_rank.T) == 30
    assert numerical_rank(np.zeros((3, 4))) == 0
    assert numerical_rank(0.0 * circulant) == 0
    noise = np.diag([1.0, 1e-8, 1e-20])
    assert numerical_rank(noise) == 2
    assert numerical_rank(noise.astype(np.float32)) == 1
    assert numerical_rank(noise, rtol=1e-3) == 1


def test_singular_matrices():
    ones = Circulant(jnp.ones(2), shape=(2, 2))
    assert condition_number(ones) == float("inf")
    assert log_determinant(ones) == (0.0, float("-inf"))
    assert log_determinant(np.zeros((2, 2))) == (0.0, float("-inf"))
    assert condition_number(np.zeros((2, 2))) == float("inf")


def test_a_toeplitz_matrix_on_which_levinson_breaks_down():
    # Levinson's recursion divides by zero, because the leading 1 x 1 and 3 x 3 blocks of this matrix are singular.
    T = scipy.linalg.toeplitz([0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])
    with pytest.raises(np.linalg.LinAlgError):
        scipy.linalg.solve_toeplitz(T[0], np.ones(4))
    sign, log = log_determinant(T)
    assert sign == 1.0 and log == pytest.approx(0.0, abs=1e-12)
    assert condition_number(T) == pytest.approx(np.linalg.cond(T))


@pytest.mark.parametrize("shape", [(8, 8), (5, 8), (8, 5), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(("f", "g"), [(1.0, -1.0), (0.5, 0.0)])
def test_displacement_rank_by_its_definition(shape, f, g):
    m, n = shape
    rng = np.random.default_rng(0)
    column, row = rng.normal(size=n), rng.normal(size=m)
    for W in (scipy.linalg.toeplitz(column, row), rng.normal(size=(n, m)), np.outer(column, row), np.ones((n, m))):
        expected = np.linalg.matrix_rank(shift(n, f) @ W - W @ shift(m, g))
        assert displacement_rank(W.T, f=f, g=g) == expected


@pytest.mark.parametrize("r", [1, 2, 3])
def test_displacement_rank_of_sums_of_circulant_times_skew_circulant(r):
    n = 9
    G, H = np.random.default_rng(0).normal(size=(2, r, n))
    W = sum(paper_f_circulant(g, 1.0) @ paper_f_circulant(h, -1.0) for g, h in zip(G, H, strict=True))
    assert displacement_rank(W.T) == r
    assert displacement_rank(W.T.astype(np.float32)) == r
    # displacement_rank(W) computes the displacement of the transpose of W, which has a larger rank.
    assert displacement_rank(W) > r


def test_displacement_ranks_of_families():
    c, v = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    C, S = Circulant(jnp.asarray(c), shape=(8, 8)), SkewCirculant(jnp.asarray(v), shape=(8, 8))
    assert displacement_rank(C) == displacement_rank(S) == 1
    assert displacement_rank(C, g=1.0) == 0 and displacement_rank(S, f=-1.0) == 0
    assert displacement_rank(C + S) == 2
    # In x @ (S @ C), x is multiplied by the skew-circulant matrix S first. So S @ C is the transpose of a product
    # Z_1(g) Z_{-1}(h) as in the paper, and has the displacement rank 1.
    assert displacement_rank(S @ C) == 1 and displacement_rank(C @ S) > 1
    T = scipy.linalg.toeplitz(c, [c[0], *v[1:]])
    assert displacement_rank(T) == displacement_rank(T[:5]) == 2
    assert displacement_rank(np.linalg.inv(np.asarray(T, np.float64))) == 2


def test_what_is_no_matrix():
    circulant = Circulant(jnp.ones(3), shape=(3, 3))
    for function in (singular_values, numerical_rank, condition_number, log_determinant, displacement_rank):
        for wrong in (np.ones(3), np.ones((1, 2, 2)), np.ones((0, 0)), np.ones((2, 2), int), np.ones((2, 2), complex)):
            with pytest.raises(UserError, match=r"a structured matrix or a non-empty floating-point matrix"):
                function(wrong)
        for nan in (circulant.with_arrays(c=jnp.array([1.0, jnp.nan, 0.0])), np.full((3, 3), np.inf)):
            with pytest.raises(UserError, match="the 3 x 3 matrix holds numbers that are not finite"):
                function(nan)
        with pytest.raises(UserError, match=r"Circulant: c must have shape \(3,\), not \(2, 3\)"):
            function(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), circulant))
