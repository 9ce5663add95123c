"""Compare `LowDisplacementRank` with matrices from `scipy.linalg`, and test which matrices it can represent exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import gathered_sizes
from surm_jax.errors import UserError
from surm_jax.structured import LowDisplacementRank
from surm_jax.structured.families import low_displacement
from tests.speeds import fast
from tests.structured.cases import StructuredMatrixContract, assert_close


def paper_W(G: np.ndarray, H: np.ndarray) -> np.ndarray:
    """Return the matrix `W(G, H) = sum_i Z_1(g_i) Z_{-1}(h_i)` of the paper, arXiv 2406.17740."""
    return sum(scipy.linalg.circulant(g) @ skew(h) for g, h in zip(G.T, H.T, strict=True))


def skew(h: np.ndarray) -> np.ndarray:
    """Return the skew-circulant matrix `Z_{-1}(h)` of the paper, whose first column is h."""
    return scipy.linalg.toeplitz(h, np.concatenate([h[:1], -h[:0:-1]]))


def displacement(W: np.ndarray) -> np.ndarray:
    """Return the displacement `Z_1 W - W Z_{-1}` of W, computed with dense shift matrices."""
    shift = np.eye(len(W), k=-1)
    corner = np.zeros_like(shift)
    corner[0, -1] = 1
    return (shift + corner) @ W - W @ (shift - corner)


def relative_error(matrix, target) -> float:
    target = np.asarray(target, np.float64)
    return np.linalg.norm(np.asarray(matrix.to_dense(), np.float64) - target) / np.linalg.norm(target)


def draw(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


class TestLowDisplacementRank(StructuredMatrixContract):
    family = LowDisplacementRank

    def options(self, shape):
        return {"rank": min(2, *shape)}

    def nearest_options(self, shape):
        return {**self.options(shape), "steps": 0}

    def dense(self, arrays, shape):
        return paper_W(arrays["G"], arrays["H"]).T[: shape[0], : shape[1]]


def test_orientation():
    # M maps 2 features to 3. x is first multiplied by the skew-circulant matrix of h, which maps (1, 0, 0) to (0, 1, 0)
    # and (0, 0, 1) to (-1, 0, 0). Then it is multiplied by the circulant matrix of g.
    matrix = LowDisplacementRank(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[0.0], [1.0], [0.0]]), shape=(2, 3))
    np.testing.assert_allclose(matrix.to_dense(), [[3, 1, 2], [2, 3, 1]], atol=1e-5)
    np.testing.assert_allclose(matrix.apply(jnp.array([1.0, 10.0])), [23, 31, 12], rtol=1e-5)
    np.testing.assert_allclose(matrix.T.apply(jnp.array([1.0, 10.0, 100.0])), [213, 132], rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", fast([(8, 8), (7, 7), (5, 12), (12, 5)], (5, 12)), ids=str)
def test_the_transposed_direction(shape):
    N, rng = max(shape), np.random.default_rng(0)
    G, H = rng.normal(size=(2, N, 3))
    x, dy = rng.normal(size=(2, shape[0])), rng.normal(size=(2, shape[1]))
    matrix = LowDisplacementRank(jnp.asarray(G), jnp.asarray(H), shape=shape, transposed=True)
    assert matrix.T.transposed is False and matrix.T.T.transposed is True
    M = paper_W(G, H)[: shape[0], : shape[1]]

    def both(matrix, x, dy):
        y, back = jax.vjp(type(matrix).apply, matrix, x)
        through_dense = jax.vjp(lambda m: m.to_dense(), matrix)[1](x.T @ dy)[0]
        return y, matrix.to_dense(), matrix.T.to_dense(), *back(dy), through_dense

    y, dense, transpose, grad, dx, through_dense = jax.jit(both)(matrix, x, dy)
    assert_close(y, x @ M)
    assert_close(dense, M)
    assert_close(transpose, M.T)
    assert_close(dx, dy @ M.T)
    dW = np.zeros((N, N))
    dW[: shape[0], : shape[1]] = x.T @ dy
    units = np.eye(N)
    dG = [[np.sum(dW * (scipy.linalg.circulant(e) @ skew(h))) for h in H.T] for e in units]
    dH = [[np.sum(dW * (scipy.linalg.circulant(g) @ skew(e))) for g in G.T] for e in units]
    for found in (grad, through_dense):
        assert_close(found.G, dG)
        assert_close(found.H, dH)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", fast([(6, 6), (3, 8), (8, 3), (1, 1)], (3, 8)), ids=str)
def test_gradients_of_the_dense_form_are_those_of_the_product(shape):
    G, H = draw(2, max(shape), 1)
    matrix = LowDisplacementRank(jnp.asarray(G), jnp.asarray(H), shape=shape)
    weight, eye = jnp.asarray(draw(*shape)), jnp.eye(shape[0])
    forms = (lambda m: m.to_dense()), (lambda m: m.apply(eye))
    grads = [jax.grad(lambda m, form=form: jnp.sum(form(m) * weight)) for form in forms]
    dense, product = jax.jit(lambda m: [grad(m) for grad in grads])(matrix)
    jax.tree.map(assert_close, dense, product)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", fast([7, 8], 7))
def test_displacement_equation(n):
    G, H = draw(2, n, 3)
    W = np.asarray(LowDisplacementRank(jnp.asarray(G), jnp.asarray(H), shape=(n, n)).to_dense()).T
    assert_close(displacement(W), 2 * G @ H[::-1].T)
    assert np.linalg.matrix_rank(displacement(W)) == 3


HELD = {
    "circulants": (1, lambda: scipy.linalg.circulant(draw(12))),
    "skew-circulants": (1, lambda: skew(draw(13)).T),
    "Toeplitz": (2, lambda: scipy.linalg.toeplitz(*draw(2, 12))),
    "wide Toeplitz": (2, lambda: scipy.linalg.toeplitz(draw(5), draw(12))),
    "tall Toeplitz": (2, lambda: scipy.linalg.toeplitz(draw(12), draw(5))),
    "inverses of Toeplitz": (2, lambda: np.linalg.inv(scipy.linalg.toeplitz(*draw(2, 12)))),
    "products of 2 Toeplitz": (
        4,
        lambda: scipy.linalg.toeplitz(*draw(2, 12)) @ scipy.linalg.toeplitz(*draw(3, 12)[1:]),
    ),
    "sums of rank 1 and 2": (3, lambda: scipy.linalg.circulant(draw(12)) + scipy.linalg.toeplitz(*draw(4, 12)[2:])),
    "everything": (9, lambda: draw(9, 9)),
    "everything wide": (3, lambda: draw(3, 10)),
    "everything tall": (3, lambda: draw(10, 3)),
    "single numbers": (1, lambda: draw(1, 1)),
    "rows": (1, lambda: draw(1, 4)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", fast(HELD, "circulants", "tall Toeplitz"))
def test_nearest_finds_what_the_family_holds_without_any_step(name):
    rank, build = HELD[name]
    target = build()
    found = LowDisplacementRank.nearest(jnp.asarray(target), rank=rank, steps=0)
    assert found.rank == rank and found.shape == target.shape
    assert_close(paper_W(np.asarray(found.G), np.asarray(found.H)).T[: target.shape[0], : target.shape[1]], target)


# The tests of the search share one shape, rank and precision, because each combination compiles a new program.
def random_target():
    return jnp.asarray(draw(20, 20).astype(np.float32))


@pytest.mark.exhaustive
def test_the_better_start_is_no_worse_than_zero():
    """Check that `nearest` without a search is nearer than the zero matrix, even for a random target.

    The truncated SVD of the displacement is further from such a target than zero, but its best multiple is nearer.
    """
    assert relative_error(LowDisplacementRank.nearest(random_target(), rank=2, steps=0), random_target()) < 1


@pytest.mark.exhaustive
def test_half_the_rank_does_not_hold_a_product_of_two_toeplitz_matrices():
    rows = draw(3, 20).astype(np.float32)
    target = scipy.linalg.toeplitz(rows[0], rows[1]) @ scipy.linalg.toeplitz(rows[2])
    assert relative_error(LowDisplacementRank.nearest(jnp.asarray(target), rank=2, steps=60), target) > 0.1


@pytest.mark.exhaustive
def test_nearest_keeps_the_best_of_two_searches(monkeypatch):
    target, rank, searches = random_target(), 2, []

    def refine(start, target, **options):
        searches.append((start, original(start, target, **options), target, options))
        return searches[-1][1]

    original = low_displacement.refine
    monkeypatch.setattr(low_displacement, "refine", refine)
    found = relative_error(LowDisplacementRank.nearest(target, rank=rank, steps=60), target)

    (svd, refined_svd, scaled, options), (other, refined_other, _, same_options) = searches
    assert options == same_options == {"steps": 60, "progress": False}
    U, S, Vt = np.linalg.svd(displacement(np.asarray(scaled, np.float64).T))
    assert_close(2 * svd.G @ svd.H[::-1].T, U[:, :rank] * S[:rank] @ Vt[:rank], "float32")
    errors = [relative_error(m, scaled) for m in (svd, refined_svd, other, refined_other)]
    assert found <= min(errors) * (1 + 1e-5)
    assert errors[1] < 0.99 * errors[0] and errors[3] < 0.99 * errors[2]
    assert errors[1] != errors[3]


@pytest.mark.exhaustive
def test_nearest_is_better_than_gradient_descent():
    """Compare `nearest` with the paper's gradient descent, from random starts and with several learning rates."""
    target = random_target()
    size = jnp.sum(target**2)

    def descend(key, rate):
        start = 0.3 * jax.random.normal(key, (2, 20, 2))

        def loss(leaves):
            return jnp.sum((target - LowDisplacementRank(*leaves, shape=(20, 20)).to_dense()) ** 2) / size

        end = jax.lax.fori_loop(0, 200, lambda _, leaves: leaves - rate * jax.grad(loss)(leaves), start)
        return jnp.sqrt(loss(end))

    rates, keys = jnp.repeat(jnp.array([0.1, 0.3, 1.0, 3.0]), 2), jax.random.split(jax.random.key(1), 8)
    errors = jax.jit(jax.vmap(descend))(keys, rates)
    assert np.nanmin(errors) < 1
    assert relative_error(LowDisplacementRank.nearest(target, rank=2), target) < np.nanmin(errors)


@pytest.mark.exhaustive
def test_nearest_does_not_depend_on_the_scale_and_works_under_jit():
    target = random_target()
    error = relative_error(LowDisplacementRank.nearest(target, rank=2, steps=60), target)
    for scale in (1e-30, 1e30):
        found = LowDisplacementRank.nearest(scale * target, rank=2, steps=60)
        assert abs(relative_error(found, scale * target) / error - 1) < 0.01
    nearest = jax.jit(LowDisplacementRank.nearest, static_argnames=("rank", "steps"))
    assert abs(relative_error(nearest(target, rank=2, steps=60), target) / error - 1) < 0.01


@pytest.mark.parametrize("steps", fast([0, 60]))
def test_the_nearest_to_zero_is_zero_and_can_learn(steps):
    found = LowDisplacementRank.nearest(jnp.zeros((20, 20)), rank=2, steps=steps)
    assert not np.any(found.to_dense())
    grad = jax.grad(lambda m: jnp.sum(m.apply(jnp.arange(1.0, 21.0))))(found)
    assert np.all(np.any(np.asarray(grad.G) != 0, axis=0))


def test_nearest_to_numbers_that_are_not_finite():
    with pytest.raises(UserError, match="the target holds numbers that are not finite"):
        LowDisplacementRank.nearest(jnp.zeros((20, 20)).at[1, 1].set(jnp.nan), rank=2)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_takes_one_transform_in_and_one_out_and_two_for_the_terms(transposed):
    matrix = LowDisplacementRank(jnp.ones((8, 3)), jnp.ones((8, 3)), shape=(8, 8), transposed=transposed)

    def rows(fn):
        """Return how many vectors the FFTs of a function transform in total.

        x has 5 rows, and there are 3 terms. The columns of G and H are transformed too.
        """
        ffts = [eqn.invars[0].aval.shape for eqn in _equations(jax.make_jaxpr(fn)(matrix, jnp.ones((5, 8))).jaxpr)]
        return sum(np.prod(shape[:-1], dtype=int) for shape in ffts)

    forward = 5 * (2 * 3 + 2) + 2 * 3
    assert rows(type(matrix).apply) == forward
    assert rows(jax.grad(lambda m, x: jnp.sum(jnp.sin(m.apply(x))), argnums=(0, 1))) == 2 * forward


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "fft":
            yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


@pytest.mark.parametrize("axis_type", fast([AxisType.Auto, AxisType.Explicit], AxisType.Auto), ids=str)
@pytest.mark.parametrize("transposed", fast([False, True], False))
def test_no_activation_is_gathered(transposed, axis_type):
    rng = np.random.default_rng(0)
    G, H = rng.normal(size=(2, 10, 2)).astype(np.float32)
    x = rng.normal(size=(16, 3, 10)).astype(np.float32)
    matrix = LowDisplacementRank(jnp.asarray(G), jnp.asarray(H), shape=(10, 10), transposed=transposed)

    def loss_and_grads(matrix, x):
        return jax.value_and_grad(lambda m, x: jnp.sum(jnp.sin(m.apply(x))), argnums=(0, 1))(matrix, x)

    expected = jax.jit(loss_and_grads)(matrix, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        matrix = jax.device_put(matrix, NamedSharding(mesh, P()))
        compiled = jax.jit(loss_and_grads).lower(matrix, x).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // 8] == []
        actual = compiled(matrix, x)
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), actual, expected)


@pytest.mark.parametrize(("shape", "rank", "numbers"), [((768, 768), 1, 1536), ((768, 3072), 4, 24576)], ids=str)
def test_numbers_held(shape, rank, numbers):
    matrix = jax.eval_shape(lambda: LowDisplacementRank.init(jax.random.key(0), shape, scale=1.0, rank=rank))
    assert matrix.num_params == numbers and matrix.rank == rank and matrix.compact() is matrix


def test_starts_with_G_zero_and_H_random():
    matrix = LowDisplacementRank.init(jax.random.key(0), (5, 3), scale=0.5, rank=2)
    assert matrix.G.shape == (5, 2) and not np.any(matrix.G)
    np.testing.assert_array_equal(matrix.H, 0.5 * jax.random.normal(jax.random.key(0), (5, 2)))


@pytest.mark.parametrize("rank", [0, -1, 6, 1.0])
def test_impossible_rank_names_both_numbers(rank):
    message = f"a 5 x 3 matrix has a displacement rank from 1 to 5, but {rank} was asked for"
    with pytest.raises(UserError, match=message):
        LowDisplacementRank.init(jax.random.key(0), (5, 3), scale=1.0, rank=rank)
    with pytest.raises(UserError, match=message):
        LowDisplacementRank.nearest(jnp.ones((5, 3)), rank=rank)


def test_factors_that_do_not_fit():
    with pytest.raises(UserError, match=r"H must have shape \(5, 2\), not \(5, 3\)"):
        LowDisplacementRank(G=jnp.ones((5, 2)), H=jnp.ones((5, 3)), shape=(5, 4))
    with pytest.raises(UserError, match=r"G must have shape \(5, 2\), not \(4, 2\)"):
        LowDisplacementRank(G=jnp.ones((4, 2)), H=jnp.ones((5, 2)), shape=(5, 4))
    with pytest.raises(UserError, match=r"G must have shape \(5, 1\), not \(5,\)"):
        LowDisplacementRank(G=jnp.ones(5), H=jnp.ones(5), shape=(5, 4))
