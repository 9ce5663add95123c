"""Compare `Tiled` with the formulas of MoRA, applied to one chunk at a time, and `nearest` with least squares."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.structured import COMPRESSIONS, DECOMPRESSIONS, Tiled, tiled_side
from tests.speeds import fast
from tests.structured.cases import ProjectionContract, assert_close


def groups(size: int, p: int) -> np.ndarray:
    """Return the group of each of `size` neighbours, which the released code divides into p groups."""
    longer = size - p * (size // p)
    return np.array([i // (size // p + 1) if i < longer * (size // p + 1) else (i - longer) // (size // p)
                     for i in range(size)])  # fmt: skip


def mora(x: np.ndarray, weight: np.ndarray, out: int, compress: str, decompress: str) -> np.ndarray:
    """Return what MoRA adds to the output for every row of x.

    `weight` is the matrix by which the released code multiplies the chunks. It is the transpose of `Tiled.M`.
    """
    m, p, q = x.shape[1], weight.shape[1], weight.shape[0]
    chunks = [x[:, [i % m for i in range(start, start + p)]] for start in range(0, m, p)]
    if compress == "rotate":
        pairs = [chunk[:, : p // 2] + 1j * chunk[:, p // 2 :] for chunk in chunks]
        turned = [z * np.exp(1j * c * 10000.0 ** (-2 * np.arange(p // 2) / p)) for c, z in enumerate(pairs)]
        chunks = [np.concatenate([z.real, z.imag], axis=1) for z in turned]
    if compress in ("rotate", "decouple"):
        y = np.concatenate([chunk @ weight.T for chunk in chunks], axis=1)
        return y[:, [j % y.shape[1] for j in range(out)]]
    short = {
        "modulo": lambda: sum(chunks),
        "contiguous": lambda: np.stack([x[:, groups(m, p) == group].sum(1) for group in range(p)], axis=1),
        "truncate": lambda: x[:, :p],
    }[compress]()
    y = short @ weight.T
    if decompress == "truncate":
        return np.concatenate([y, np.zeros((len(y), out - q))], axis=1)
    return y[:, groups(out, q) if decompress == "contiguous" else [j % q for j in range(out)]]


def mora_dense(M: np.ndarray, shape: tuple[int, int], compress: str, decompress: str = "modulo") -> np.ndarray:
    return mora(np.eye(shape[0]), M.T, shape[1], compress, decompress)


class TestTiled(ProjectionContract):
    family = Tiled

    def options(self, shape):
        return {"side": 3}

    def dense(self, arrays, shape):
        return mora_dense(arrays["M"], shape, "modulo")


class TestRotated(ProjectionContract):
    family = Tiled

    def options(self, shape):
        return {"side": 4, "compress": "rotate" if shape[0] > 1 else "modulo"}

    def example(self):
        return Tiled.random((6, 8), side=4, compress="rotate")

    def dense(self, arrays, shape):
        return mora_dense(arrays["M"], shape, "rotate" if shape[0] > 1 else "modulo")


def test_orientation():
    # The matrix maps 4 features to 5. Input 3 is multiplied by row 1 of M. Output 4 repeats output 0, which uses the
    # first column of M.
    matrix = Tiled(jnp.array([[1.0, 2.0], [3.0, 4.0]]), shape=(4, 5))
    np.testing.assert_array_equal(matrix.apply(jnp.array([0.0, 0.0, 0.0, 1.0])), [3, 4, 3, 4, 3])
    np.testing.assert_array_equal(matrix.T.apply(jnp.array([0.0, 0.0, 0.0, 0.0, 1.0])), [1, 3, 1, 3])
    # The matrix maps 3 features to 2. The last chunk consists of features 2 and 0, so feature 0 is used twice.
    matrix = Tiled(matrix.M, shape=(3, 2))
    np.testing.assert_array_equal(matrix.to_dense(), [[1 + 3, 2 + 4], [3, 4], [1, 2]])


def test_rotation_by_hand():
    # With p = 2 the two entries of a chunk are the coordinates of one plane. The second chunk is rotated by the angle
    # 1, and its product with M is the second half of the output.
    matrix = Tiled(jnp.eye(2), shape=(4, 4), compress="rotate")
    turn = [[np.cos(1), np.sin(1)], [-np.sin(1), np.cos(1)]]
    expected = np.eye(4)
    expected[2:, 2:] = turn
    np.testing.assert_allclose(matrix.to_dense(), expected, atol=1e-6)
    np.testing.assert_allclose(matrix.T.to_dense(), expected.T, atol=1e-6)


SIZES = [(6, 4), (4, 6), (7, 5), (5, 13), (13, 5)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("compress", "decompress"),
    fast(
        [
            *itertools.product(("modulo", "contiguous", "truncate"), DECOMPRESSIONS),
            ("rotate", "modulo"),
            ("decouple", "modulo"),
        ],
        ("modulo", "modulo"),
        ("contiguous", "truncate"),
        ("rotate", "modulo"),
        unpack=True,
    ),
)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_product_transpose_and_projection_of_any_sizes(shape, compress, decompress):
    rng = np.random.default_rng(0)
    M, target = rng.normal(size=(4, 3)), rng.normal(size=shape)
    x, dy = rng.normal(size=(2, 3, shape[0])), rng.normal(size=(2, 3, shape[1]))

    how = {"compress": compress, "decompress": decompress}

    def everything(matrix, x, dy):
        return matrix.apply(x), matrix.to_dense(), matrix.T.apply(dy), matrix.T.to_dense()

    y, dense, back, transpose = jax.jit(everything)(Tiled(jnp.asarray(M), shape=shape, **how), x, dy)
    D = mora_dense(M, shape, **how)
    for actual, expected in ((y, x @ D), (dense, D), (back, dy @ D.T), (transpose, D.T)):
        assert_close(actual, expected)

    found = jax.jit(lambda target: Tiled.nearest(target, side=4, **how))(target)
    sizes = found.M.shape
    assert sizes == (4, 4) and not found.transposed
    basis = np.stack([mora_dense(e.reshape(sizes), shape, **how).ravel() for e in np.eye(16)], axis=1)
    assert_close(np.ravel(found.M), np.linalg.lstsq(basis, target.ravel())[0])


def test_sharing_is_tiles_and_the_nearest_is_their_mean_where_the_side_divides():
    rng = np.random.default_rng(0)
    M, target = rng.normal(size=(4, 4)).astype(np.float32), rng.normal(size=(12, 8)).astype(np.float32)
    np.testing.assert_array_equal(Tiled(jnp.asarray(M), shape=(12, 8)).to_dense(), np.tile(M, (3, 2)))
    tiles = [target[i : i + 4, j : j + 4] for i in range(0, 12, 4) for j in range(0, 8, 4)]
    assert_close(Tiled.nearest(target, side=4).M, np.mean(tiles, axis=0), "float32")


@pytest.mark.usefixtures("x64")
def test_rank():
    M = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)))
    ranks = [np.linalg.matrix_rank(Tiled(M, shape=(24, 24), compress=how).to_dense()) for how in COMPRESSIONS]
    assert ranks == [6, 6, 6, 24, 24]


def test_rotation_reads_no_input_that_the_output_has_no_room_for():
    matrix = Tiled(jnp.ones((2, 2)), shape=(8, 3), compress="rotate")
    np.testing.assert_array_equal(np.any(matrix.to_dense(), axis=1), [True] * 4 + [False] * 4)


@pytest.mark.parametrize(
    ("shape", "rank", "sharing", "rotation"),
    # The sides for sharing are the rounded square roots of (in + out) rank: 1536, 3840, 49152 and 12288. The last root
    # is 110.85. For a 1 x 1 matrix it is 1.41.
    [((768, 768), 1, 39, 38), ((768, 3072), 1, 62, 62), ((4096, 8192), 4, 222, 222), ((4096, 8192), 1, 111, 110)],
)
def test_the_side_has_as_many_numbers_as_lora(shape, rank, sharing, rotation):
    assert tiled_side(shape, rank) == sharing
    assert tiled_side(shape, rank, rotate=True) == rotation
    assert tiled_side(shape, rank, down=True) == int(np.sqrt(sum(shape) * rank))
    assert tiled_side((1, 1), 1, rotate=True) == 2
    matrix = jax.eval_shape(lambda: Tiled.init(jax.random.key(0), shape, scale=1.0, side=sharing))
    assert matrix.num_params == sharing**2 and abs(matrix.num_params / (sum(shape) * rank) - 1) < 0.02


def test_no_number_of_M_that_is_nowhere():
    for compress, sizes in (("modulo", (5, 3)), ("rotate", (4, 3))):
        matrix = Tiled.init(jax.random.key(0), (5, 3), scale=1.0, side=8, compress=compress)
        assert matrix.M.shape == sizes


def test_sharing_is_lean_and_rotation_not():
    x = jnp.ones((64, 32))

    def kept(compress):
        matrix = Tiled(jnp.ones((4, 4)), shape=(32, 32), compress=compress)
        _, pull = jax.vjp(Tiled.apply, matrix, x)
        return matrix.small_residuals, max(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("contiguous") == kept("truncate") == kept("modulo") == (True, 64 * 4)
    assert kept("rotate") == (False, 64 * 32)


@pytest.mark.parametrize("side", [0, -1, 2.0, None])
def test_impossible_side(side):
    for build in (
        lambda: Tiled.init(jax.random.key(0), (5, 3), scale=1.0, side=side),
        lambda: Tiled.nearest(jnp.ones((5, 3)), side=side, compress="rotate"),
    ):
        with pytest.raises(UserError, match=f"side must be a positive integer, not {side}"):
            build()


def test_rotation_needs_pairs():
    for shape, side in (((5, 3), 3), ((1, 3), 2)):
        with pytest.raises(UserError, match=f"side must be even and in_features at least 2, not {side} and {shape[0]}"):
            Tiled.init(jax.random.key(0), shape, scale=1.0, side=side, compress="rotate")
    with pytest.raises(UserError, match="tiled_side: rank must be a positive integer, not 0"):
        tiled_side((5, 3), 0)


def test_arrays_that_do_not_fit():
    with pytest.raises(UserError, match=r"M must be an array of shape \(p, p'\), not \(2,\)"):
        Tiled(jnp.ones(2), shape=(5, 3))
    with pytest.raises(UserError, match="M must have a shape from 1 x 1 to 5 x 3, not 2 x 4"):
        Tiled(jnp.ones((2, 4)), shape=(5, 3))
    with pytest.raises(UserError, match="to 5 x 3, with an even number of rows, not 3 x 3"):
        Tiled(jnp.ones((3, 3)), shape=(3, 5), compress="rotate", transposed=True)
    with pytest.raises(UserError, match=r"compress must be one of modulo, .*, not 'turn'"):
        Tiled(jnp.ones((2, 2)), shape=(5, 3), compress="turn")
    with pytest.raises(UserError, match="decompress=truncate has no effect with compress=rotate"):
        Tiled(jnp.ones((2, 2)), shape=(5, 3), compress="rotate", decompress="truncate")
