"""Compare `Kronecker` with `numpy.kron`, and `nearest` with the rearrangement of Van Loan and Pitsianis."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import gathered_sizes
from surm_jax.errors import UserError
from surm_jax.structured.families.factors.kronecker import Kronecker, near_square_factors
from tests.structured.cases import ProjectionContract, assert_close


class TestKronecker(ProjectionContract):
    family = Kronecker

    def options(self, shape):
        (m1, n1), (m2, n2) = near_square_factors(shape)
        return {"terms": min(2, m1 * n1, m2 * n2)}

    def dense(self, arrays, shape):
        # The factors of the paper's W = A (x) B are the transposes of the arrays here.
        pairs = zip(arrays["A"], arrays["B"], strict=True)
        return sum(np.kron(a.T, b.T) for a, b in pairs).T


def random_factors(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def rearranged(dense, factors):
    """Return the matrix whose row (i1, j1) lists the entries of block (i1, j1) of `dense`.

    It turns a Kronecker product into an outer product (Van Loan and Pitsianis).
    """
    (m1, n1), (m2, n2) = factors
    blocks = [dense[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2] for i in range(m1) for j in range(n1)]
    return np.array([block.ravel() for block in blocks])


def test_orientation():
    # A has the shape (1, 3) and B the shape (2, 1), so M maps 2 features to 3. Row i of M is B[i] times A.
    matrix = Kronecker(A=jnp.array([[[1.0, 2.0, 3.0]]]), B=jnp.array([[[1.0], [10.0]]]))
    assert matrix.shape == (2, 3) and matrix.factor_shapes == ((1, 3), (2, 1))
    np.testing.assert_array_equal(matrix.to_dense(), [[1, 2, 3], [10, 20, 30]])
    np.testing.assert_array_equal(matrix.apply(jnp.array([1.0, 0.0])), [1, 2, 3])
    np.testing.assert_array_equal(matrix.T.apply(jnp.array([1.0, 0.0, 0.0])), [1, 10])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("factors", "terms", "cost"),
    # A row of x takes k (m1 n1 m2 + n1 m2 n2) multiplications if A comes first, and k (m1 m2 n2 + m1 n1 n2) if B does.
    [
        (((6, 2), (3, 5)), 1, 6 * 2 * 3 + 2 * 3 * 5),
        (((2, 6), (5, 3)), 1, 2 * 5 * 3 + 2 * 6 * 3),
        (((6, 2), (3, 5)), 4, 4 * (6 * 2 * 3 + 2 * 3 * 5)),
        (((2, 6), (5, 3)), 3, 3 * (2 * 5 * 3 + 2 * 6 * 3)),
    ],
    ids=str,
)
def test_any_factors_in_the_cheaper_order(factors, terms, cost):
    A, B, x, dy = random_factors(
        0,
        *((terms, *factor) for factor in factors),
        (8, 5, factors[0][0] * factors[1][0]),
        (8, 5, factors[0][1] * factors[1][1]),
    )
    matrix = Kronecker(A=jnp.asarray(A), B=jnp.asarray(B))
    M = sum(np.kron(a, b) for a, b in zip(A, B, strict=True))
    y, (grad, dx) = jax.jit(lambda m, x, dy: (m.apply(x), jax.vjp(Kronecker.apply, m, x)[1](dy)))(matrix, x, dy)
    assert_close(y, x @ M)
    assert_close(dx, dy @ M.T)
    dM = rearranged(np.einsum("abi,abo->io", x, dy), factors)
    assert_close(grad.A, (B.reshape(terms, -1) @ dM.T).reshape(A.shape))
    assert_close(grad.B, (A.reshape(terms, -1) @ dM).reshape(B.shape))
    flops = jax.jit(Kronecker.apply).lower(matrix, jnp.asarray(x)).cost_analysis()["flops"]
    assert flops == 2 * cost * 40


@pytest.mark.usefixtures("x64")
def test_products_and_transposes_go_through_the_factors():
    A, B, C, D = random_factors(0, (1, 4, 3), (1, 2, 5), (1, 3, 2), (1, 5, 3))
    left, right = (Kronecker(A=jnp.asarray(a), B=jnp.asarray(b)) for a, b in ((A, B), (C, D)))
    both = Kronecker(A=jnp.asarray(A @ C), B=jnp.asarray(B @ D))
    assert_close(right.apply(left.to_dense()), both.to_dense())
    assert left.T.factor_shapes == ((3, 4), (5, 2))


@pytest.mark.parametrize(
    ("shape", "factors", "numbers", "rank"),
    [
        ((768, 768), ((32, 24), (24, 32)), 1536, 576),
        ((768, 3072), ((32, 48), (24, 64)), 3072, 768),
        ((3072, 768), ((64, 24), (48, 32)), 3072, 768),
        ((768, 256), ((32, 16), (24, 16)), 896, 256),
        ((7, 7), ((7, 1), (1, 7)), 14, 1),
        ((1, 1), ((1, 1), (1, 1)), 2, 1),
    ],
    ids=str,
)
def test_default_factors_numbers_and_rank(shape, factors, numbers, rank):
    matrix = jax.eval_shape(lambda: Kronecker.init(jax.random.key(0), shape, scale=1.0))
    assert matrix.factor_shapes == near_square_factors(shape) == factors
    assert matrix.num_params == numbers and matrix.shape == shape and matrix.compact() is matrix
    assert np.prod([min(factor) for factor in factors]) == rank


@pytest.mark.parametrize("shape", [(12, 12), (12, 18), (36, 16), (5, 12), (64, 48)], ids=str)
def test_no_other_factors_hold_fewer_numbers_or_as_few_at_a_higher_rank(shape):
    def merit(m1, n1, m2, n2):
        return m1 * n1 + m2 * n2, -min(m1, n1) * min(m2, n2)

    m, n = shape
    splits = itertools.product(range(1, m + 1), range(1, n + 1))
    best = min(merit(m1, n1, m // m1, n // n1) for m1, n1 in splits if m % m1 == 0 == n % n1)
    (m1, n1), (m2, n2) = near_square_factors(shape)
    assert (m1 * m2, n1 * n2) == shape and merit(m1, n1, m2, n2) == best


@pytest.mark.usefixtures("x64")
def test_the_rank_is_the_product_of_the_ranks():
    A, B = random_factors(0, (1, 6, 4), (1, 4, 6))
    matrix = Kronecker(A=jnp.asarray(A), B=jnp.asarray(B))
    assert matrix.factor_shapes == near_square_factors((24, 24))
    assert np.linalg.matrix_rank(np.asarray(matrix.to_dense())) == 16


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("factors", "terms"), [(((2, 3), (3, 2)), 1), (((2, 3), (3, 2)), 4), (((6, 2), (1, 3)), 2)], ids=str
)
def test_nearest_leaves_the_singular_values_beyond_the_terms(factors, terms):
    target = np.random.default_rng(0).normal(size=(6, 6))
    found = jax.jit(lambda dense: Kronecker.nearest(dense, terms=terms, factor_shapes=factors))(target)
    singular = np.linalg.svd(rearranged(target, factors), compute_uv=False)
    M = sum(np.kron(a, b) for a, b in zip(*map(np.asarray, (found.A, found.B)), strict=True))
    assert abs(np.linalg.norm(target - M) - np.linalg.norm(singular[terms:])) < 1e-10
    assert found.factor_shapes == factors and found.terms == terms
    # The two factors of a term have equal norms, so each norm is the square root of the norm of the term.
    for leaf in (found.A, found.B):
        assert_close(np.linalg.norm(leaf, axis=(1, 2)), np.sqrt(singular[:terms]))


def test_the_nearest_to_zero_and_empty_terms_can_learn():
    found = Kronecker.nearest(jnp.zeros((6, 6)), terms=2)
    assert not np.any(found.A) and not np.any(found.to_dense())
    np.testing.assert_allclose(np.linalg.norm(found.B, axis=(1, 2)), 1, rtol=1e-6)
    single = np.kron(*random_factors(0, (3, 2), (2, 3))).astype(np.float32)
    found = Kronecker.nearest(jnp.asarray(single), terms=2)
    first, second = np.linalg.norm(found.B, axis=(1, 2))
    np.testing.assert_allclose([first, second], np.sqrt(np.linalg.norm(single)), rtol=1e-5)
    assert_close(found.to_dense(), single, "float32")


def test_starts_with_A_zero_and_B_random():
    matrix = Kronecker.init(jax.random.key(0), (6, 6), scale=0.5, terms=3, factor_shapes=((2, 3), (3, 2)))
    assert matrix.A.shape == (3, 2, 3) and not np.any(matrix.A)
    np.testing.assert_array_equal(matrix.B, 0.5 * jax.random.normal(jax.random.key(0), (3, 3, 2)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("factors", [((4, 2), (2, 3)), ((2, 3), (4, 2))], ids=str)
def test_no_activation_is_gathered_and_values_equal_one_devices(factors, axis_type):
    A, B, x, dy = (v.astype(np.float32) for v in random_factors(0, *((2, *f) for f in factors), (16, 3, 8), (16, 3, 6)))

    def product(matrix, x, dy):
        y, vjp = jax.vjp(Kronecker.apply, matrix, x)
        return y, vjp(dy)

    matrix = Kronecker(A=A, B=B)
    expected = jax.jit(product)(matrix, x, dy)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (x, dy))
        compiled = jax.jit(product).lower(jax.device_put(matrix, NamedSharding(mesh, P())), x, dy).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // mesh.size] == []
        actual = compiled(jax.device_put(matrix, NamedSharding(mesh, P())), x, dy)
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), actual, expected)


@pytest.mark.parametrize("terms", [0, -1, 7, 1.0])
def test_impossible_terms_name_all_numbers(terms):
    message = rf"6 terms of 2 x 3 \(x\) 3 x 2 reach every matrix, so terms must be from 1 to 6, not {terms}"
    for build in (
        lambda: Kronecker.init(jax.random.key(0), (6, 6), scale=1.0, terms=terms, factor_shapes=((2, 3), (3, 2))),
        lambda: Kronecker.nearest(jnp.ones((6, 6)), terms=terms, factor_shapes=((2, 3), (3, 2))),
    ):
        with pytest.raises(UserError, match=message):
            build()


def test_impossible_factors_name_all_numbers():
    message = "factors of 2 x 3 and 3 x 3 multiply to 6 x 9, but the shape is 6 x 6; 3 x 2 and 2 x 3 would fit"
    with pytest.raises(UserError, match=message):
        Kronecker.init(jax.random.key(0), (6, 6), scale=1.0, factor_shapes=((2, 3), (3, 3)))
    with pytest.raises(UserError, match=message):
        Kronecker.nearest(jnp.ones((6, 6)), factor_shapes=((2, 3), (3, 3)))
    for factors in (((2, 3),), ((2, 3), (3, 0)), ((2, 3), (3, 2.0)), 6):
        with pytest.raises(UserError, match=r"must be \(\(m1, n1\), \(m2, n2\)\), four positive integers, not"):
            Kronecker.init(jax.random.key(0), (6, 6), scale=1.0, factor_shapes=factors)


def test_arrays_that_do_not_fit():
    with pytest.raises(UserError, match=r"B must have shape \(2, 3, 3\), not \(1, 3, 3\)"):
        Kronecker(A=jnp.ones((2, 2, 2)), B=jnp.ones((1, 3, 3)))
    with pytest.raises(UserError, match=r"A must be an array of shape \(k, m1, n1\), not \(2, 2\)"):
        Kronecker(A=jnp.ones((2, 2)), B=jnp.ones((1, 3, 3)))
    with pytest.raises(UserError, match="so terms must be from 1 to 4, not 5"):
        Kronecker(A=jnp.ones((5, 2, 2)), B=jnp.ones((5, 3, 3)))
