"""Compare `BlockCirculant` with blocks from `scipy.linalg.circulant`, and with the forward pass of C3A."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import gathered_sizes
from surm_jax.errors import UserError
from surm_jax.structured import Circulant
from surm_jax.structured.families.block_circulant import BlockCirculant
from tests.structured.cases import ProjectionContract, assert_close

GRIDS = [(1, 1, 8), (2, 3, 5), (3, 2, 4), (2, 4, 1), (4, 1, 6)]


class TestBlockCirculant(ProjectionContract):
    family = BlockCirculant

    def options(self, shape):
        return {}  # By default the blocks have the largest possible size.

    def dense(self, arrays, shape):
        # Block (q, p) of the paper's W is the circulant matrix with first column c[p, q].
        W = [[scipy.linalg.circulant(c) for c in row] for row in arrays["c"].swapaxes(0, 1)]
        return np.vstack([np.hstack(row) for row in W]).T


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def dense(c):
    return TestBlockCirculant().dense({"c": c}, None)


def test_orientation():
    # M maps 2 features to 4. It has two 2 x 2 blocks, and both are multiplied by the same two inputs.
    matrix = BlockCirculant(jnp.array([[[1.0, 2.0], [3.0, 4.0]]]))
    assert matrix.shape == (2, 4) and matrix.block == 2
    np.testing.assert_array_equal(matrix.to_dense(), [[1, 2, 3, 4], [2, 1, 4, 3]])
    np.testing.assert_allclose(matrix.apply(jnp.array([1.0, 10.0])), [21, 12, 43, 34], rtol=1e-6)
    np.testing.assert_allclose(matrix.T.apply(jnp.array([1.0, 0.0, 0.0, 0.0])), [1, 2], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid_values_gradients_and_transpose(grid):
    p, q, b = grid
    c, x, dy = normal(0, *grid), normal(1, 2, 3, p * b), normal(2, 2, 3, q * b)
    M = dense(c)

    def results(matrix, x, dy):
        y, vjp = jax.vjp(BlockCirculant.apply, matrix, x)
        return y, vjp(dy), matrix.to_dense(), matrix.T.to_dense(), matrix.T.apply(dy)

    y, (grad, dx), itself, transpose, back = jax.jit(results)(BlockCirculant(jnp.asarray(c)), x, dy)
    assert_close(y, x @ M)
    assert_close(itself, M)
    assert_close(transpose, M.T)
    assert_close(back, dy @ M.T)
    assert_close(dx, dy @ M.T)
    dM = np.einsum("abi,abo->io", x, dy)
    steps = np.eye(c.size).reshape(c.size, *grid)
    assert_close(grad.c, np.reshape([np.sum(dense(step) * dM) for step in steps], grid))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)], ids=str)
def test_nearest_is_the_nearest_circulant_to_every_block(shape, block):
    target = normal(0, *shape)
    found = jax.jit(lambda dense: BlockCirculant.nearest(dense, block=block))(target)
    assert found.shape == shape and found.block == block
    for i, j in np.ndindex(*found.c.shape[:2]):
        part = target[i * block : (i + 1) * block, j * block : (j + 1) * block]
        means = [np.mean([part[a, (a + k) % block] for a in range(block)]) for k in range(block)]
        assert_close(found.c[i, j], means)


@pytest.mark.usefixtures("x64")
def test_the_two_ends_are_a_circulant_and_a_dense_matrix():
    c, target, x = normal(0, 8), normal(1, 6, 8), normal(2, 3, 8)
    one = BlockCirculant(jnp.asarray(c)[None, None])
    assert_close(one.apply(jnp.asarray(x)), Circulant(jnp.asarray(c), shape=(8, 8)).apply(jnp.asarray(x)))
    np.testing.assert_array_equal(BlockCirculant.nearest(jnp.asarray(target), block=1).to_dense(), target)


def c3a(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return what the C3A layer of Hugging Face's peft adds to the output for an input x and its weight w.

    The formula is that of `tuners/c3a` in peft 0.18 to 0.21.
    """
    _, n, b = w.shape
    blocks = x.reshape(*x.shape[:-1], n, b)
    spectra = np.einsum("...nb,mnb->...mb", np.fft.ifft(blocks), np.fft.fft(w))
    y = np.fft.fft(spectra).real
    return y.reshape(*y.shape[:-2], -1) / x.shape[-1]


def from_c3a(w: np.ndarray) -> np.ndarray:
    """Return the array c of the `BlockCirculant` that equals a C3A layer with the weight w.

    The formula in the docstring of `BlockCirculant` is applied to one index at a time.
    """
    (q, p, b), c = w.shape, np.zeros((w.shape[1], w.shape[0], w.shape[2]), w.dtype)
    for i, j, k in np.ndindex(p, q, b):
        c[i, j, k] = w[j, i, -k % b] / (p * b)
    return c


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_c3a_is_this_family(grid):
    p, q, b = grid
    w, x = normal(0, q, p, b), normal(1, 2, 3, p * b)
    assert_close(BlockCirculant(jnp.asarray(from_c3a(w))).apply(jnp.asarray(x)), c3a(x, w))


@pytest.mark.exhaustive
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_c3a_of_peft_is_this_family(grid):
    reason = "compares with peft's C3A: pip install -r requirements-peers.txt"
    torch, peft = (pytest.importorskip(name, reason=reason) for name in ("torch", "peft"))
    p, q, b = grid
    linear = torch.nn.Linear(p * b, q * b)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    config = peft.C3AConfig(block_size=b, target_modules=["0"])
    peer = peft.get_peft_model(torch.nn.Sequential(linear), config)
    layer = peer.base_model.model[0]
    w, x = normal(0, q, p, b).astype(np.float32), normal(1, 2, 3, p * b).astype(np.float32)
    assert layer.c3a_kernel["default"].shape == w.shape
    layer.c3a_kernel["default"].data = torch.tensor(w)
    matrix = BlockCirculant(jnp.asarray(from_c3a(w)))
    assert_close(matrix.apply(x), peer(torch.tensor(x)).detach().numpy(), "float32")
    assert_close(matrix.to_dense(), layer.get_delta_weight("default").detach().numpy().T, "float32")


@pytest.mark.parametrize(
    ("shape", "block", "numbers"),
    [((768, 768), None, 768), ((768, 3072), None, 3072), ((768, 768), 64, 9216), ((768, 501), None, 768 * 167)],
    ids=str,
)
def test_numbers_held(shape, block, numbers):
    matrix = jax.eval_shape(lambda: BlockCirculant.init(jax.random.key(0), shape, scale=1.0, block=block))
    assert matrix.num_params == numbers and matrix.shape == shape and matrix.compact() is matrix


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_no_activation_is_gathered_and_values_equal_one_devices(axis_type):
    c, x, dy = (normal(0, *shape).astype(np.float32) for shape in ((2, 3, 4), (16, 3, 8), (16, 3, 12)))

    def product(matrix, x, dy):
        y, vjp = jax.vjp(BlockCirculant.apply, matrix, x)
        return y, vjp(dy)

    expected = jax.jit(product)(BlockCirculant(c), x, dy)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, dy = (jax.device_put(v, NamedSharding(mesh, P("data"))) for v in (x, dy))
        matrix = jax.device_put(BlockCirculant(c), NamedSharding(mesh, P()))
        compiled = jax.jit(product).lower(matrix, x, dy).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // mesh.size] == []
        actual = compiled(matrix, x, dy)
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), actual, expected)


@pytest.mark.parametrize("block", [0, -2, 5, 24, 2.0])
def test_a_block_that_does_not_divide_names_those_that_do(block):
    message = f"blocks of {block} do not divide both sizes of 12 x 18; possible are 1, 2, 3, 6$"
    with pytest.raises(UserError, match=message):
        BlockCirculant.init(jax.random.key(0), (12, 18), scale=1.0, block=block)
    with pytest.raises(UserError, match=message):
        BlockCirculant.nearest(jnp.ones((12, 18)), block=block)


def test_an_array_that_is_no_grid():
    with pytest.raises(UserError, match=r"c must be an array of shape \(in / b, out / b, b\), not \(2, 3\)"):
        BlockCirculant(jnp.ones((2, 3)))
