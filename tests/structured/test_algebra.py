"""Tests of sums, products and multiples of structured matrices, of their operators, and of invalid operands."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from surm_jax.errors import UserError
from surm_jax.structured import (
    FAMILIES,
    Circulant,
    CirculantPair,
    LowRank,
    Product,
    Scaled,
    Sum,
)
from tests.structured.cases import MatrixContract, assert_close


def circulant(c: np.ndarray, m: int, n: int) -> np.ndarray:
    return scipy.linalg.circulant(c).T[:m, :n]


def zeros(kind, shape, **options):
    return kind.init(jax.random.key(0), shape, scale=1.0, **options)


class CompositeContract(MatrixContract):
    def abstract(self, shape):
        return jax.eval_shape(lambda: self.build(*shape))

    def path(self, name):
        places = re.sub(r"(terms|factors)_(\d+)_", r".\1[\2]", name).replace("matrix_", ".matrix")
        return ".".join(places.rpartition(self.field(name))[:2])

    def field(self, name):
        return name.rpartition("_")[2]


class TestProduct(CompositeContract):
    family = Product

    def build(self, m, n):
        between = max(m, n) + 1
        return Product((zeros(Circulant, (m, between)), zeros(CirculantPair, (between, n))))

    def dense(self, arrays, shape):
        m, n = shape
        between = max(m, n) + 1
        second = circulant(arrays["factors_1_r1"] * arrays["factors_1_r2"], between, n)
        return circulant(arrays["factors_0_c"], m, between) @ second


class TestScaledSum(CompositeContract):
    family = Scaled

    def build(self, m, n):
        terms = (zeros(Circulant, (m, n)), 0.5 * zeros(LowRank, (m, n), rank=1))
        return Scaled(Sum(terms), jnp.zeros(()))

    def dense(self, arrays, shape):
        low_rank = np.outer(arrays["matrix_terms_1_matrix_down"], arrays["matrix_terms_1_matrix_up"])
        return arrays["alpha"] * (circulant(arrays["matrix_terms_0_c"], *shape) + 0.5 * low_rank)


@pytest.fixture
def parts():
    """Return three 3 x 3 matrices and their dense forms, which are written by hand.

    None of them is symmetric, so a test fails if one is transposed by mistake.
    """
    C = Circulant(jnp.array([1.0, 2.0, 4.0]), shape=(3, 3))
    L = LowRank(down=jnp.array([[1.0], [10.0], [100.0]]), up=jnp.array([[1.0, 2.0, 3.0]]))
    D = Circulant(jnp.array([0.0, 1.0, 0.0]), shape=(3, 3))
    dense = [
        [[1, 2, 4], [4, 1, 2], [2, 4, 1]],
        [[1, 2, 3], [10, 20, 30], [100, 200, 300]],
        [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
    ]
    return (C, L, D), tuple(np.array(M, np.float64) for M in dense)


def test_operators(parts):
    (A, B, C), (a, b, c) = parts
    x = np.array([1.0, -2.0, 3.0], np.float32)
    cases = [
        (A + B, a + b),
        (A - B, a - b),
        (A @ B, a @ b),
        (B @ A, b @ a),
        (-A, -a),
        (2.0 * A, 2 * a),
        (A * 2, 2 * a),
        (jnp.float32(2) * A, 2 * a),
        (A * np.float32(2), 2 * a),
        (np.float64(2) * A, 2 * a),
        (A @ (B - 3.0 * (C @ A)), a @ (b - 3 * c @ a)),
        (-(A - B) @ C + 0.5 * (A + C), -(a - b) @ c + 0.5 * (a + c)),
    ]

    def results(matrices, x):
        return [(m.to_dense(), m.apply(x), m.T.to_dense()) for m in matrices]

    matrices, expected = zip(*cases, strict=True)
    for (dense, y, transpose), M in zip(jax.jit(results)(matrices, x), expected, strict=True):
        assert_close(dense, M, "float32")
        assert_close(y, x @ M, "float32")
        assert_close(transpose, M.T, "float32")


def test_dense_products_are_multiplied_in_full_precision():
    product = zeros(Circulant, (4, 5)) @ zeros(LowRank, (5, 3), rank=2) @ zeros(FAMILIES["Kronecker"], (3, 4), terms=1)
    program = str(jax.make_jaxpr(lambda product: product.to_dense())(product))
    precisions = re.findall(r"precision=(.*)", program)
    assert len(precisions) >= 4 and {*precisions} == {"(Precision.HIGHEST, Precision.HIGHEST)"}, program


def test_a_multiple_is_lean_if_its_factor_is_constant():
    x, matrix = jnp.ones((64, 32)), zeros(LowRank, (32, 32), rank=1)

    def kept(alpha):
        _, pull = jax.vjp(lambda multiple: multiple.apply(x), alpha * matrix)
        large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size and leaf is not x]
        return (alpha * matrix).small_residuals, len(large)

    assert kept(2.0) == (True, 0)
    assert kept(jnp.ones(())) == (False, 1)


def test_orientation_of_a_product():
    # The product is x @ A @ B. The factor A maps 2 features to 3, and the factor B maps these 3 features to 1.
    A = LowRank(down=jnp.array([[1.0], [10.0]]), up=jnp.array([[1.0, 2.0, 3.0]]))
    B = LowRank(down=jnp.array([[1.0], [0.0], [2.0]]), up=jnp.array([[1.0]]))
    product = A @ B
    assert product.shape == (2, 1) and product.T.shape == (1, 2)
    np.testing.assert_array_equal(product.to_dense(), [[7], [70]])
    np.testing.assert_array_equal(product.apply(jnp.array([1.0, 1.0])), [77])
    np.testing.assert_array_equal(product.T.to_dense(), [[7, 70]])


def test_nested_composites_are_flattened(parts):
    (A, B, C), _ = parts
    assert ((A + B) + (C + A)).terms == (A, B, C, A)
    assert (A @ (B @ C)).factors == (A, B, C)
    assert Sum((Sum((A, B)), C)) == A + B + C
    assert (A @ (B + C)).factors == (A, B + C)
    assert 2.0 * (3.0 * A) == 6.0 * A and -1 * -A == 1.0 * A
    alpha = jnp.ones(())
    assert (2.0 * (alpha * A)).matrix.alpha is alpha


def test_fused_composites_are_those_of_fused_parts():
    pair = CirculantPair(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), shape=(2, 2))
    for matrix in (pair + pair, pair @ pair, 2.0 * pair, jnp.float32(2) * (pair + pair @ pair)):
        fused = matrix.compact()
        assert type(fused) is type(matrix)
        assert fused.num_params - ("alpha" in fused.arrays()) == (matrix.num_params - ("alpha" in matrix.arrays())) / 2
        np.testing.assert_array_equal(fused.to_dense(), matrix.to_dense())


def test_a_constant_factor_is_structure_and_an_array_is_a_leaf(parts):
    (A, _, _), _ = parts
    constant, learned = 2.0 * A, jnp.float32(2) * A
    assert list(constant.arrays()) == ["matrix_c"] and constant.num_params == 3
    assert list(learned.arrays()) == ["matrix_c", "alpha"] and learned.num_params == 4
    assert constant != 3.0 * A and constant == 2 * A and hash(constant) == hash(2 * A)
    assert jax.tree.structure(constant) != jax.tree.structure(3.0 * A)
    assert jax.tree.structure(learned) == jax.tree.structure(jnp.float32(3) * A)
    x = jnp.array([1.0, 0.0, 0.0])
    slope = jax.grad(lambda m: m.apply(x)[2])(learned).alpha
    np.testing.assert_allclose(slope, 4.0, rtol=1e-6)
    # The released code of the paper initialises alpha with zero. There the gradient of alpha must not be zero, because
    # otherwise training could not change alpha.
    grad = jax.grad(lambda m: m.apply(x)[2])(jnp.float32(0) * A)
    assert grad.alpha != 0 and not np.any(grad.matrix.c)


def test_a_learned_factor_stays_an_array(parts):
    (A, _, _), _ = parts
    with pytest.raises(UserError, match=r"Scaled: alpha must be an array, because it is learned, not 3\.0"):
        (jnp.float32(2) * A).with_arrays(alpha=3.0)
    with pytest.raises(UserError, match="no array 'alpha'"):
        (2.0 * A).with_arrays(alpha=jnp.float32(3))


def test_nothing_of_the_matrix_size_is_formed():
    C, P = (zeros(kind, (768, 768)) for kind in (Circulant, CirculantPair))
    matrix = jnp.float32(2) * (C @ P - 3.0 * zeros(LowRank, (768, 768), rank=2)) + P
    step = jax.make_jaxpr(jax.grad(lambda m, x: jnp.sum(m.apply(x) ** 2), argnums=(0, 1)))(matrix, jnp.ones((5, 768)))
    assert "5,768" in str(step)
    assert "768,768" not in str(step)


def test_nothing_between_the_factors_is_rounded():
    rng = np.random.default_rng(0)
    A, B = (Circulant(jnp.asarray(rng.normal(size=64), jnp.float32), shape=(64, 64)) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(5, 64)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ circulant(np.asarray(A.c, np.float64), 64, 64)
    exact = exact @ circulant(np.asarray(B.c, np.float64), 64, 64)
    np.testing.assert_allclose(np.asarray((A @ B).apply(x), np.float64), exact, rtol=2.0**-8, atol=1e-4)
    assert np.any((A @ B).apply(x) != B.apply(A.apply(x)))


def test_names_of_arrays_are_identifiers_and_lead_to_them(parts):
    (A, B, C), _ = parts
    matrix = A + jnp.float32(2) * (B @ (C - A))
    for name, leaf in matrix.arrays().items():
        assert name.isidentifier()
        assert eval(f"matrix{TestProduct().path(name)}") is leaf
    moved = matrix.with_arrays(terms_1_matrix_factors_1_terms_0_c=A.c)
    assert moved == A + matrix.terms[1].alpha * (B @ (A - A))


def test_composites_are_no_families(parts):
    assert not {Sum, Product, Scaled} & set(FAMILIES.values())
    assert not any(hasattr(kind, method) for kind in (Sum, Product, Scaled) for method in ("init", "nearest"))


def test_parts_that_do_not_fit():
    wide, tall = zeros(Circulant, (2, 3)), zeros(Circulant, (3, 2))
    with pytest.raises(
        UserError, match=r"Sum: terms must have one shape, but terms\[0\] is 2 x 3 and terms\[2\] is 3 x 2"
    ):
        Sum((wide, wide, tall))
    with pytest.raises(UserError, match=r"terms\[0\] is 2 x 3 and terms\[1\] is 3 x 2"):
        wide - tall
    message = r"Product: factors\[1\] is 3 x 2 and factors\[2\] is 3 x 2: factors\[2\] must have 2 input features"
    with pytest.raises(UserError, match=message):
        wide @ tall @ tall
    with pytest.raises(UserError, match=r"Scaled: alpha must have shape \(\), not \(2,\)"):
        wide * jnp.ones(2)
    with pytest.raises(UserError, match=r"Sum, terms_1: Circulant: c must have shape \(3,\), not \(4,\)"):
        (wide + wide).with_arrays(terms_1_c=jnp.ones(4))
    with pytest.raises(UserError, match=r"no array 'terms_2_c'; did you mean 'terms_[01]_c'"):
        (wide + wide).with_arrays(terms_2_c=jnp.ones(3))


def test_parts_that_are_no_structured_matrices(parts):
    (A, _, _), (a, _, _) = parts
    for kind, name in ((Sum, "terms"), (Product, "factors")):
        with pytest.raises(UserError, match=f"{kind.__name__}: {name}_1 must be a structured matrix, not 1.0"):
            kind((A, 1.0))
        with pytest.raises(UserError, match=f"{kind.__name__} needs at least one matrix"):
            kind(())
        with pytest.raises(UserError, match=f"{name} must be a sequence of structured matrices"):
            kind(A)
    with pytest.raises(UserError, match="Scaled: matrix must be a structured matrix"):
        Scaled(1.0, 2.0)
    for wrong in (lambda: A + a, lambda: a - A, lambda: A @ a, lambda: a @ A, lambda: A + 1.0, lambda: A * A):
        with pytest.raises(TypeError, match="Circulant"):
            wrong()
