"""Compare `Toeplitz` and `SymmetricToeplitz` with matrices from `scipy.linalg.toeplitz`."""

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
from tests.structured.cases import ProjectionContract, assert_close

FAMILIES = [Toeplitz, SymmetricToeplitz]


class TestToeplitz(ProjectionContract):
    family = Toeplitz

    def dense(self, arrays, shape):
        # The first row of the paper's W, whose shape is (out, in), is t[in - 1], ..., t[0].
        start = shape[0] - 1
        return scipy.linalg.toeplitz(c=arrays["t"][start:], r=arrays["t"][start::-1]).T


class TestSymmetricToeplitz(ProjectionContract):
    family = SymmetricToeplitz

    def dense(self, arrays, shape):
        return scipy.linalg.toeplitz(arrays["t"])[: shape[0], : shape[1]]


def product(matrix, x, dy):
    y, vjp = jax.vjp(type(matrix).apply, matrix, x)
    return y, vjp(dy)


def test_orientation():
    # M maps 2 features to 3. t lists its first column from bottom to top, and then the rest of its first row.
    matrix = Toeplitz(jnp.array([1.0, 2.0, 3.0, 4.0]), shape=(2, 3))
    np.testing.assert_array_equal(matrix.to_dense(), [[2, 3, 4], [1, 2, 3]])
    np.testing.assert_allclose(matrix.apply(jnp.array([1.0, 10.0])), [12, 23, 34], rtol=1e-6)
    np.testing.assert_allclose(matrix.T.apply(jnp.array([1.0, 10.0, 100.0])), [432, 321], rtol=1e-6)
    matrix = SymmetricToeplitz(jnp.array([1.0, 2.0, 3.0]), shape=(2, 3))
    np.testing.assert_array_equal(matrix.to_dense(), [[1, 2, 3], [2, 1, 2]])
    np.testing.assert_allclose(matrix.apply(jnp.array([1.0, 10.0])), [21, 12, 23], rtol=1e-6)
    np.testing.assert_allclose(matrix.T.apply(jnp.array([1.0, 10.0, 100.0])), [321, 212], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (6, 1)], ids=str)
def test_nearest_is_the_mean_of_each_diagonal(shape, family):
    target = np.random.default_rng(0).normal(size=shape)
    fold = abs if family is SymmetricToeplitz else int
    means = np.empty(shape)
    for i, j in np.ndindex(*shape):
        means[i, j] = np.mean([v for (a, b), v in np.ndenumerate(target) if fold(b - a) == fold(j - i)])
    assert_close(jax.jit(lambda dense: family.nearest(dense).to_dense())(target), means)


@pytest.mark.usefixtures("x64")
def test_symmetric_is_general_with_mirrored_diagonals():
    for shape in [(6, 6), (4, 6), (6, 4)]:
        matrix, M = TestSymmetricToeplitz().create(shape)
        general = matrix.general()
        assert type(general) is Toeplitz and general.num_params == sum(shape) - 1
        assert_close(TestToeplitz().oracle(general.arrays(), shape), M)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)], ids=str)
def test_displacement_by_shifts_is_zero_but_for_a_row_and_a_column(shape):
    M = np.asarray(TestToeplitz().create(shape)[0].to_dense())
    displacement = np.eye(shape[0], k=-1) @ M - M @ np.eye(shape[1], k=-1)
    assert not np.any(displacement[1:, :-1]) and np.any(displacement)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(8, 8), (13, 4)], ids=str)
def test_the_corners_do_not_leak_into_each_other(shape):
    # These two corners become neighbours in the skew-circulant matrix into which the product embeds M.
    M, corners = np.zeros(shape), np.zeros(sum(shape) - 1)
    corners[0], corners[-1], M[-1, 0], M[0, -1] = 1e8, 3.0, 1e8, 3.0
    y = jax.jit(Toeplitz.apply)(Toeplitz(jnp.asarray(corners), shape=shape), np.eye(shape[0]))
    np.testing.assert_allclose(y, M, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("shape", "length"), [((768, 768), 768), ((500, 301), 400)], ids=str)
def test_two_transforms_of_half_the_embedding_and_two_in_reverse(family, shape, length):
    matrix = jax.eval_shape(lambda: family.init(jax.random.key(0), shape, scale=1.0))
    x, dy = (jax.ShapeDtypeStruct((10, size), jnp.float32) for size in shape)

    def lengths(function, *args):
        compiled = jax.jit(function).lower(*args).compile().as_text()
        return [int(n) for n in re.findall(r"c64\[10,(\d+)\]\S* fft\(", compiled)]

    assert lengths(family.apply, matrix, x) == [length] * 2
    assert lengths(product, matrix, x, dy) == [length] * 4


@pytest.mark.parametrize(
    ("shape", "general", "symmetric"),
    [((768, 768), 1535, 768), ((768, 3072), 3839, 3072), ((5, 3), 7, 5), ((1, 1), 1, 1)],
    ids=str,
)
def test_numbers_held(shape, general, symmetric):
    for family, numbers in zip(FAMILIES, (general, symmetric), strict=True):
        matrix = jax.eval_shape(lambda family=family: family.init(jax.random.key(0), shape, scale=1.0))
        assert matrix.num_params == numbers and matrix.compact() is matrix


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_no_activation_is_gathered_and_values_equal_one_devices(axis_type):
    rng = np.random.default_rng(0)
    t, x, dy = (rng.normal(size=size).astype(np.float32) for size in (8, (16, 3, 8), (16, 3, 6)))
    matrix = SymmetricToeplitz(t, shape=(8, 6))
    expected = jax.jit(product)(matrix, x, dy)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (x, dy))
        matrix = jax.device_put(matrix, NamedSharding(mesh, P()))
        compiled = jax.jit(product).lower(matrix, x, dy).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // mesh.size] == []
        actual = compiled(matrix, x, dy)
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), actual, expected)


@pytest.mark.parametrize("shape", [(5, 5), (5, 3), (3, 5)], ids=str)
def test_wrong_number_of_numbers_names_both(shape):
    with pytest.raises(UserError, match=rf"^Toeplitz: t must have shape \({sum(shape) - 1},\), not \(6,\)"):
        Toeplitz(jnp.ones(6), shape=shape)
    with pytest.raises(UserError, match=r"^SymmetricToeplitz: t must have shape \(5,\), not \(6,\)"):
        SymmetricToeplitz(jnp.ones(6), shape=shape)
    with pytest.raises(UserError, match="two positive integers, not 4"):
        Toeplitz(jnp.ones(7), shape=4)
