"""Compare `ToeplitzPair` and `SymmetricToeplitzPair` with products of matrices from `scipy.linalg.toeplitz`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import gathered_sizes
from surm_jax.errors import UserError
from surm_jax.structured.families.toeplitz import SymmetricToeplitz, Toeplitz
from surm_jax.structured.families.toeplitz_pair import SymmetricToeplitzPair, ToeplitzPair
from tests.speeds import fast
from tests.structured.cases import StructuredMatrixContract, assert_close

FAMILIES = [(ToeplitzPair, Toeplitz), (SymmetricToeplitzPair, SymmetricToeplitz)]


class TestToeplitzPair(StructuredMatrixContract):
    family = ToeplitzPair

    def nearest_options(self, shape):
        return {"steps": 0}

    def dense(self, arrays, shape):
        # The paper writes W = T2 T1, with T1 of shape (N, in) and T2 of shape (out, N). The first row of each factor is
        # the start of its vector t, reversed.
        T1, T2 = (
            scipy.linalg.toeplitz(c=t[size - 1 :], r=t[size - 1 :: -1])
            for t, size in ((arrays["t1"], shape[0]), (arrays["t2"], max(shape)))
        )
        return (T2 @ T1).T


class TestSymmetricToeplitzPair(StructuredMatrixContract):
    family = SymmetricToeplitzPair

    def nearest_options(self, shape):
        return {"steps": 0}

    def dense(self, arrays, shape):
        T1, T2 = (scipy.linalg.toeplitz(arrays[name]) for name in ("t1", "t2"))
        return (T2 @ T1).T[: shape[0], : shape[1]]


def contract(family):
    return TestToeplitzPair() if family is ToeplitzPair else TestSymmetricToeplitzPair()


def product(matrix, x, dy):
    y, vjp = jax.vjp(type(matrix).apply, matrix, x)
    return y, vjp(dy)


def relative_error(target, matrix):
    return np.linalg.norm(target - np.asarray(matrix.to_dense())) / np.linalg.norm(target)


def test_orientation_and_order():
    # M maps 2 features to 3, so the factors have the shapes (2, 3) and (3, 3). x is multiplied by the matrix of t1
    # first.
    shift, mix = jnp.array([0.0, 0.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 2.0, 1.0, 0.0])
    pair = ToeplitzPair(t1=shift, t2=mix, shape=(2, 3))
    np.testing.assert_allclose(pair.to_dense(), [[0, 2, 1], [0, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(pair.apply(jnp.array([1.0, 10.0])), [0, 2, 21], atol=1e-5)
    np.testing.assert_allclose(pair.T.apply(jnp.array([1.0, 10.0, 100.0])), [120, 200], rtol=1e-6)
    # M is T1 T2 and not T2 T1. The two products differ, because these symmetric factors do not commute.
    pair = SymmetricToeplitzPair(t1=jnp.array([0.0, 1.0, 0.0]), t2=jnp.array([0.0, 0.0, 1.0]), shape=(3, 3))
    np.testing.assert_allclose(pair.to_dense(), [[0, 0, 0], [1, 0, 1], [0, 0, 0]], atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(5, 5), (3, 5), (5, 3)], ids=str)
def test_transposing_exchanges_the_factors(shape):
    pair, _ = TestToeplitzPair().create(shape)
    first, second = pair.factors
    assert first.shape == (shape[0], 5) and second.shape == (5, shape[1])
    np.testing.assert_array_equal(pair.T.t1, second.T.t)
    np.testing.assert_array_equal(pair.T.t2, first.T.t)
    pair, _ = TestSymmetricToeplitzPair().create(shape)
    assert pair.T.t1 is pair.t2 and pair.T.t2 is pair.t1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_displacement_rank_is_at_most_four(family):
    M = np.asarray(contract(family).create((12, 12))[0].to_dense())
    shift = np.eye(12, k=-1)
    assert np.linalg.matrix_rank(shift @ M - M @ shift) == 4


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_four_transforms_without_padding_and_four_in_reverse(family):
    matrix = jax.eval_shape(lambda: family.init(jax.random.key(0), (768, 768), scale=1.0))
    x = jax.ShapeDtypeStruct((10, 768), jnp.float32)

    def lengths(function, *args):
        compiled = jax.jit(function).lower(*args).compile().as_text()
        return [int(n) for n in re.findall(r"c64\[10,(\d+)\]\S* fft\(", compiled)]

    assert lengths(family.apply, matrix, x) == [768] * 4
    assert lengths(product, matrix, x, x) == [768] * 8


@pytest.mark.parametrize(
    ("shape", "general", "symmetric"),
    [((768, 768), 3070, 1536), ((768, 3072), 3839 + 6143, 6144), ((5, 3), 9 + 7, 10), ((1, 1), 2, 2)],
    ids=str,
)
def test_numbers_held(shape, general, symmetric):
    for (family, _), numbers in zip(FAMILIES, (general, symmetric), strict=True):
        matrix = jax.eval_shape(lambda family=family: family.init(jax.random.key(0), shape, scale=1.0))
        assert matrix.num_params == numbers and matrix.compact() is matrix


@pytest.mark.parametrize(("family", "count"), [(ToeplitzPair, 9), (SymmetricToeplitzPair, 5)])
def test_starts_with_t1_zero_and_t2_random(family, count):
    pair = family.init(jax.random.key(0), (5, 5), scale=0.5)
    assert pair.t1.shape == (count,) and not np.any(pair.t1)
    np.testing.assert_array_equal(pair.t2, 0.5 * jax.random.normal(jax.random.key(0), (count,)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("family", "single"), fast(FAMILIES, FAMILIES[1], unpack=True))
def test_nearest_starts_at_the_nearest_single_one_with_balanced_factors(family, single):
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)))
    start = family.nearest(target, steps=0)
    assert_close(start.to_dense(), single.nearest(target).to_dense())
    first, second = (np.linalg.norm(factor.to_dense()[:4]) for factor in start.factors)
    assert abs(first - second) < 1e-10


@pytest.mark.exhaustive
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("family", "single"), fast(FAMILIES, FAMILIES[1], unpack=True))
def test_nearest_is_nearer_than_a_single_one_finds_members_and_near_to_zero_can_learn(family, single):
    shape = (4, 7)
    nearest = jax.jit(family.nearest)
    target = np.random.default_rng(0).normal(size=shape)
    found = nearest(target)
    assert type(found) is family and found.shape == shape
    assert relative_error(target, found) < 0.95 * relative_error(target, single.nearest(target))

    # The target is a product whose two factors are near the identity, so that the search meets no local minimum.
    member, _ = contract(family).create(shape)
    identity = single.nearest(jnp.eye(*shape)).t, single.nearest(jnp.eye(7)).t
    leaves = {"t1": identity[0] + 0.2 * member.t1, "t2": identity[1] + 0.2 * member.t2}
    M = contract(family).oracle(leaves, shape)
    assert relative_error(M, nearest(M)) < 0.2 * relative_error(M, single.nearest(M))

    found = nearest(np.zeros(shape))
    assert not np.any(found.to_dense())
    grad = jax.grad(lambda m: jnp.sum(m.apply(jnp.array([1.0, 2.0, 4.0, 8.0]))))(found)
    assert np.any(grad.t1) or np.any(grad.t2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_no_activation_is_gathered_and_values_equal_one_devices(axis_type):
    rng = np.random.default_rng(0)
    t1, t2, x, dy = (rng.normal(size=size).astype(np.float32) for size in (8, 8, (16, 3, 8), (16, 3, 6)))

    def results(matrix, x, dy):
        return product(matrix, x, dy), matrix.to_dense()

    matrix = SymmetricToeplitzPair(t1, t2, shape=(8, 6))
    expected = jax.jit(results)(matrix, x, dy)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (x, dy))
        matrix = jax.device_put(matrix, NamedSharding(mesh, P()))
        compiled = jax.jit(results).lower(matrix, x, dy).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // mesh.size] == []
        actual = compiled(matrix, x, dy)
        assert actual[1].sharding.is_fully_replicated
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), actual, expected)


def test_wrong_number_of_numbers_names_both():
    with pytest.raises(UserError, match=r"^ToeplitzPair: t1 must have shape \(7,\), not \(9,\)"):
        ToeplitzPair(jnp.ones(9), jnp.ones(9), shape=(3, 5))
    with pytest.raises(UserError, match=r"^ToeplitzPair: t2 must have shape \(7,\), not \(9,\)"):
        ToeplitzPair(jnp.ones(9), jnp.ones(9), shape=(5, 3))
    with pytest.raises(UserError, match=r"^SymmetricToeplitzPair: t2 must have shape \(5,\), not \(3,\)"):
        SymmetricToeplitzPair(jnp.ones(5), jnp.ones(3), shape=(5, 3))
    with pytest.raises(UserError, match="two positive integers, not 4"):
        ToeplitzPair(jnp.ones(7), jnp.ones(7), shape=4)
    with pytest.raises(UserError, match="steps must be an integer of at least 0, not -1"):
        ToeplitzPair.nearest(jnp.ones((3, 3)), steps=-1)
