"""Tests of circular and skew-circular convolution.

They are compared with the sums that define them. On a mesh of 8 devices, no device may gather the activations of the
others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import gathered_sizes
from surm_jax.devices.batch import BATCH_AXES, batch_local
from surm_jax.errors import UserError
from surm_jax.structured import (
    Circulant,
    CirculantPair,
    circular_convolve,
    fast_length,
    skew_convolve,
)
from tests.speeds import fast
from tests.structured.cases import assert_close

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "data": ((8,), ("data",), P("data")),
    "fsdp": ((8,), ("fsdp",), P("fsdp")),
    "data x fsdp": ((4, 2), ("data", "fsdp"), P(("data", "fsdp"))),
    "data x model": ((4, 2), ("data", "model"), P("data")),
}
BATCH, TOKENS, IN, OUT = 16, 3, 9, 7


def loop(x: np.ndarray, c: np.ndarray, wrapped: int = 1) -> np.ndarray:
    """Return the convolution of two vectors, computed from its definition as a sum.

    Terms that wrap around are multiplied by `wrapped`: 1 for circular and -1 for skew-circular convolution.
    """
    n = len(c)
    return np.array([sum(x[i] * c[(j - i) % n] * (wrapped if i > j else 1) for i in range(len(x))) for j in range(n)])


@pytest.fixture
def problem():
    """Return a `CirculantPair`, activations, and cotangents of the output, as NumPy arrays that each test can shard."""
    rng = np.random.default_rng(0)
    pair = CirculantPair(*rng.normal(size=(2, IN)).astype(np.float32), shape=(IN, OUT))
    x = rng.normal(size=(BATCH, TOKENS, IN)).astype(np.float32)
    return pair, x, rng.normal(size=(BATCH, TOKENS, OUT)).astype(np.float32)


def loss_and_grads(pair, x, dy):
    return jax.value_and_grad(lambda pair, x: jnp.sum(jnp.sin(pair.apply(x)) * dy), argnums=(0, 1))(pair, x)


def assert_trees_close(actual, expected, precision="float32"):
    jax.tree.map(lambda a, e: assert_close(a, e, precision), actual, expected)


def on(mesh, spec, *arrays):
    return [jax.device_put(array, NamedSharding(mesh, spec)) for array in arrays]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (7, 7), (8, 8), (3, 8), (3, 7), (1, 5)])
def test_circular_convolve_is_its_defining_sum(m, n):
    rng = np.random.default_rng(0)
    x, c = jnp.asarray(rng.normal(size=m)), jnp.asarray(rng.normal(size=n))
    assert_close(circular_convolve(x, c), loop(np.asarray(x), np.asarray(c)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("m", "n"),
    fast(
        [(1, 1), (2, 2), (1, 2), (7, 7), (8, 8), (2, 8), (6, 8), (3, 7), (1, 5), (9, 10)], (7, 7), (6, 8), unpack=True
    ),
)
def test_skew_convolve_is_its_defining_sum_with_its_gradients(m, n):
    rng = np.random.default_rng(0)
    x, v, dy = rng.normal(size=(2, m)), rng.normal(size=n), rng.normal(size=(2, n))
    Z = np.stack([loop(unit, v, -1) for unit in np.eye(n)[:m]])
    y, vjp = jax.vjp(jax.jit(skew_convolve), x, v)
    dx, dv = vjp(dy)
    assert_close(y, x @ Z)
    assert_close(dx, dy @ Z.T)
    # v_k is the entry on the diagonal j - i = k, and minus v_k is the entry on the diagonal j - i = k - n. So the
    # gradient of v_k is a signed sum over these two diagonals.
    X, expected = dy.T @ np.pad(x, ((0, 0), (0, n - m))), []
    for _ in range(n):
        expected.append(np.trace(X))
        X = np.roll(X, -1, axis=0) * np.where(np.arange(n) == n - 1, -1, 1)[:, None]
    assert_close(dv, expected)


@pytest.mark.parametrize("n", [9, 10])
@pytest.mark.parametrize("convolve", [circular_convolve, skew_convolve])
def test_a_convolution_takes_three_transforms_forward_and_three_back(convolve, n):
    def count(fn):
        return jax.jit(fn).lower(jnp.ones((4, n)), jnp.ones(n)).as_text().count("stablehlo.fft ")

    def loss(x, v):
        return jnp.sum(jnp.sin(convolve(x, v)))

    assert count(convolve) == 3
    assert count(jax.grad(loss, argnums=(0, 1))) == 6


def test_an_even_skew_convolution_works_on_half_the_length():
    text = jax.jit(skew_convolve).lower(jnp.ones((4, 10)), jnp.ones(10)).as_text()
    assert text.count("stablehlo.fft ") == text.count("length = [5]") == 3


@pytest.mark.parametrize(("convolve", "name"), [(circular_convolve, "c"), (skew_convolve, "v")])
def test_convolutions_refuse_what_they_would_get_wrong(convolve, name):
    with pytest.raises(UserError, match=rf"{name} \(n,\) need m <= n, but have shapes \(2, 5\) and \(4,\)"):
        convolve(jnp.ones((2, 5)), jnp.ones(4))
    with pytest.raises(UserError, match=f"x and {name} must both be float32 or both float64, not bfloat16 and float32"):
        convolve(jnp.ones(4, jnp.bfloat16), jnp.ones(4))


def test_fast_length_is_the_next_5_smooth_number():
    def smooth(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    lengths = [n for n in range(1, 4097) if smooth(n)]
    for n in range(1, 4097):
        assert fast_length(n) == next(length for length in lengths[np.searchsorted(lengths, n) :])
    assert fast_length(10**9 + 1) == 2**26 * 15 and fast_length(2**40) == 2**40
    for n in (0, -3):
        with pytest.raises(UserError, match=f"n must be at least 1, not {n}"):
            fast_length(n)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("mesh_name", MESHES)
def test_no_activation_is_gathered_and_values_equal_one_devices(problem, mesh_name, axis_type):
    expected = jax.jit(loss_and_grads)(*problem)
    sizes, names, spec = MESHES[mesh_name]
    mesh = jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))
    with jax.set_mesh(mesh):
        x, dy = on(mesh, spec, *problem[1:])
        pair = jax.device_put(problem[0], NamedSharding(mesh, P()))
        compiled = jax.jit(loss_and_grads).lower(pair, x, dy).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // mesh.size] == []
        loss, (dpair, dx) = compiled(pair, x, dy)
        assert dx.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert dpair.r1.sharding.is_fully_replicated
    assert_trees_close((loss, (dpair, dx)), expected)


@pytest.mark.parametrize("n", [9, 10])
@pytest.mark.parametrize("axis_type", fast([AUTO, EXPLICIT], AUTO), ids=str)
@pytest.mark.parametrize("mesh_name", ["data", "data x fsdp"])
def test_no_activation_is_gathered_by_a_skew_convolution(mesh_name, axis_type, n):
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(BATCH, TOKENS, IN)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    grads = jax.value_and_grad(lambda x, v: jnp.sum(jnp.sin(skew_convolve(x, v))), argnums=(0, 1))
    expected = jax.jit(grads)(x, v)
    sizes, names, spec = MESHES[mesh_name]
    mesh = jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))
    with jax.set_mesh(mesh):
        (x,), (v,) = on(mesh, spec, x), on(mesh, P(), v)
        compiled = jax.jit(grads).lower(x, v).compile()
        assert [size for size in gathered_sizes(compiled.as_text()) if size >= x.size // mesh.size] == []
        loss, (dx, dv) = compiled(x, v)
        assert dx.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert dv.sharding.is_fully_replicated
    assert_trees_close((loss, (dx, dv)), expected)


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)
def test_xla_still_gathers_without_batch_local(problem, axis_type):
    """Check that without `batch_local`, XLA still gathers the activations before an FFT (jax#15680).

    If this test fails, `batch_local` is no longer needed. Then remove it, this test, and the test above, which would
    pass without it.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def naive(x, c):
        spectrum = jnp.fft.rfft(x) * jnp.fft.rfft(c)[None, None]
        return jnp.sum(jnp.sin(jnp.fft.irfft(spectrum, n=IN)))

    with jax.set_mesh(mesh):
        (x,), (c,) = on(mesh, P("data"), problem[1]), on(mesh, P(), problem[0].r1)
        text = jax.jit(jax.value_and_grad(naive, argnums=(0, 1))).lower(x, c).compile().as_text()
    assert max(gathered_sizes(text), default=0) >= x.size


@pytest.mark.parametrize(
    ("axis_type", "spec"), [(AUTO, P("data")), (EXPLICIT, P("data")), (EXPLICIT, P("fsdp")), (EXPLICIT, P())], ids=str
)
def test_batch_over_some_of_the_axes(problem, axis_type, spec):
    expected = jax.jit(loss_and_grads)(*problem)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        x, dy = on(mesh, spec, *problem[1:])
        pair = jax.device_put(problem[0], NamedSharding(mesh, P()))
        assert_trees_close(jax.jit(loss_and_grads)(pair, x, dy), expected)


@pytest.mark.parametrize("axis_type", fast([AUTO, EXPLICIT], AUTO), ids=str)
def test_eager_and_half_precision(problem, axis_type):
    pair, x, _ = problem
    expected = pair.apply(x.astype(jnp.bfloat16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        (x,) = on(mesh, P("data"), x.astype(jnp.bfloat16))
        y = jax.device_put(pair, NamedSharding(mesh, P())).apply(x)
        assert y.dtype == jnp.bfloat16
    assert_close(y, expected, "bfloat16")


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)
def test_inside_a_shard_map_of_the_callers(problem, axis_type):
    pair, x, _ = problem
    expected = pair.apply(x)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    for mine in ({"data"}, {"data", "fsdp"}):
        axes = tuple(axis for axis in BATCH_AXES if axis in mine)
        with jax.set_mesh(mesh):
            (xs,), ps = on(mesh, P(axes), x), jax.device_put(pair, NamedSharding(mesh, P()))
            apply = jax.shard_map(lambda p, x: p.apply(x), in_specs=(P(), P(axes)), out_specs=P(axes), axis_names=mine)
            assert_close(jax.jit(apply)(ps, xs), expected, "float32")


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (12, 2, IN), (0, 2, IN)], ids=str)
def test_batches_that_cannot_be_sharded_evenly(problem, shape):
    pair = problem[0]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = pair.apply(x)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AUTO,))):
        assert_close(jax.jit(lambda x: pair.apply(x))(x), expected, "float32")


def test_vmap_over_stacked_matrices_on_a_mesh():
    rng = np.random.default_rng(0)
    c, x = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(3, 8, 5)).astype(np.float32)
    expected = np.stack([[loop(row, c) for row in rows] for rows, c in zip(x, c, strict=True)])
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AUTO,))):
        y = jax.jit(jax.vmap(lambda c, x: Circulant(c, shape=(5, 5)).apply(x)))(c, x)
    assert_close(y, expected, "float32")


def test_meshes_without_a_batch_axis_and_no_mesh_call_directly():
    seen = []

    @batch_local
    def record(x):
        seen.append(x.shape)
        return x

    x = jnp.ones((16, 2))
    record(x)
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AUTO,))):
        record(x)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AUTO, AUTO))):
        record(x)
    assert seen == [(16, 2), (16, 2), (2, 2)]
    assert record.__name__ == "record"
