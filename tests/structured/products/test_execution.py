"""Tests of `updated_matmul` and `matmul` with every execution, which is a way to compute the product.

They test values, gradients, the arrays that are stored for the backward pass, and what devices send to each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import gathered_sizes
from surm_jax.errors import UserError
from surm_jax.structured import EXECUTIONS, FAMILIES, Circulant, CirculantPair, LowRank, matmul, updated_matmul
from surm_jax.structured.products import execution
from tests.speeds import fast
from tests.structured.cases import TOLERANCES, assert_close


def case(family, shape=(12, 8), batch=(4, 5), dtype="float64", seed=0):
    """Return random arguments for a test of `updated_matmul`.

    Returns:
        A structured matrix of the family (the update), the input x, the kernel, and a cotangent of the output.
    """
    rng = np.random.default_rng(seed)
    options = FAMILIES[family].options_within(shape, 4 * max(shape)) or {}
    start = jax.eval_shape(lambda: FAMILIES[family].init(jax.random.key(0), shape, scale=1.0, **options))
    update = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), start)
    draw = lambda *size: jnp.asarray(rng.normal(size=size), dtype)  # noqa: E731
    return update, draw(*batch, shape[0]), draw(*shape), draw(*batch, shape[1])


def outputs(update, x, kernel, dy, how):
    """Return the output of `updated_matmul`, and its gradients for update, x and kernel.

    Args:
        update: The structured matrix.
        x: The input.
        kernel: The dense kernel.
        dy: The cotangent of the output.
        how: The name of the execution.
    """
    y, pull = jax.vjp(lambda update, x, kernel: updated_matmul(x, kernel, update, execution=how), update, x, kernel)
    return y, *pull(dy)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", fast(FAMILIES, "Circulant", "Kronecker", "Tiled"))
def test_all_executions_give_the_same_values_and_gradients(family, monkeypatch):
    monkeypatch.setitem(execution.PIECE_BYTES, "cpu", 6 * 12 * 8)  # The 20 tokens are processed in chunks of 5.
    update, x, kernel, dy = case(family)
    M = np.asarray(update.to_dense())
    results = jax.jit(lambda *args: {how: outputs(*args, how) for how in EXECUTIONS})(update, x, kernel, dy)
    # The gradients of the execution `fft` serve as the expected ones, because the contract tests of every family
    # compare the gradients of the fast product with NumPy.
    _, expected, *_ = results["fft"]
    for y, by_update, by_x, by_kernel in results.values():
        assert_close(y, x @ (kernel + M))
        assert_close(by_x, dy @ (kernel + M).T)
        assert_close(by_kernel, np.einsum("bsi,bso->io", x, dy))
        for name, leaf in by_update.arrays().items():
            assert_close(leaf, expected.arrays()[name])


@pytest.mark.parametrize("how", fast(EXECUTIONS, "auto"))
def test_float32(how):
    update, x, kernel, dy = case("Circulant", (96, 96), (3, 50), "float32")
    y, by_update, by_x, _ = jax.jit(outputs, static_argnums=4)(update, x, kernel, dy, how)
    exact, by_exact, by_x_exact, _ = outputs(
        *jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), (update, x, kernel, dy)), how
    )
    assert y.dtype == by_x.dtype == by_update.c.dtype == jnp.float32
    for actual, expected in ((y, exact), (by_x, by_x_exact), (by_update.c, by_exact.c)):
        assert_close(actual, expected, "float32")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tokens", fast([19, 20, 23, 31], 23))
def test_pieces_of_any_number_of_tokens(tokens, monkeypatch):
    monkeypatch.setitem(execution.PIECE_BYTES, "cpu", 7 * 12 * 8)
    update, x, kernel, dy = case("Toeplitz", batch=(tokens,))
    *_, x_whole, _ = whole = outputs(update, x, kernel, dy, "dense")
    for how in ("fft", "fused"):
        y, by_update, by_x, _ = outputs(update, x, kernel, dy, how)
        assert_close(y, whole[0])
        assert_close(by_update.t, whole[1].t)
        assert_close(by_x, x_whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", ["fft", "dense", "fused"])
@pytest.mark.parametrize("batch", fast([(), (3,), (2, 3, 2)], (2, 3, 2)), ids=str)
def test_transformations(how, batch):
    update, x, kernel, _ = case("CirculantPair", (5, 7), batch)
    moved, dx, _, _ = case("CirculantPair", (5, 7), batch, seed=1)
    product = lambda update, x: updated_matmul(x, kernel, update, execution=how)  # noqa: E731
    y, dy = jax.jit(lambda at, by: jax.jvp(product, at, by))((update, x), (moved, dx))
    M, r1, r2 = update.to_dense(), update.r1 * moved.r2, moved.r1 * update.r2
    assert_close(y, x @ (kernel + M))
    assert_close(dy, dx @ (kernel + M) + x @ Circulant(r1 + r2, (5, 7)).to_dense())
    stack = jnp.stack([x, dx])
    assert_close(jax.vmap(product, (None, 0))(update, stack), stack @ (kernel + M))
    # Compare second derivatives: the directional derivative of the gradient must equal a central difference.
    gradient = jax.grad(lambda update: jnp.sum(product(update, x) ** 2))
    curvature = jax.jvp(gradient, (update,), (moved,))[1]
    step = 1e-4
    ahead, behind = (jax.tree.map(lambda a, b, s=s: a + s * step * b, update, moved) for s in (1, -1))
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), gradient(ahead), gradient(behind))
    np.testing.assert_allclose(curvature.r1, difference.r1, rtol=1e-5)


@pytest.mark.parametrize("how", ["fft", "dense", "fused"])
@pytest.mark.parametrize(
    "family", fast(["Circulant", "LowDisplacementRank", "SymmetricToeplitzPair", "Kronecker"], "Circulant")
)
def test_reverse_mode_keeps_the_input_alone(family, how):
    update, x, kernel, _ = case(family, (12, 12), (64, 5), "float32")
    _, pull = jax.vjp(lambda update, x: updated_matmul(x, kernel, update, execution=how), update, x)
    kept = {np.asarray(leaf).ctypes.data: leaf for leaf in jax.tree.leaves(pull)}.values()
    assert [leaf.size for leaf in kept if leaf.size > kernel.size] == [x.size]
    # All other stored arrays together are at most as large as one kernel and some arrays of the size of the update.
    assert sum(leaf.size for leaf in kept if leaf.size <= kernel.size) <= kernel.size + 8 * update.num_params


@pytest.mark.parametrize("how", ["fft", "dense", "fused"])
def test_no_gradient_of_the_kernel_unless_asked_for(how):
    update, x, kernel, dy = case("Circulant", (12, 8), (64,), "float32")

    def products(argnums):
        loss = lambda update, x, kernel: jnp.vdot(updated_matmul(x, kernel, update, execution=how), dy)  # noqa: E731
        program = str(jax.make_jaxpr(jax.grad(loss, argnums))(update, x, kernel))
        return program.count("f32[12,8] = dot_general") + program.count("f32[8,12] = dot_general")

    assert products((0, 1)) == (how == "dense")
    assert products((0, 1, 2)) == (how == "dense") + 1


@pytest.mark.parametrize("kind", fast([AxisType.Auto, AxisType.Explicit], AxisType.Auto))
@pytest.mark.parametrize("family", fast(FAMILIES, "CirculantPair", "Kronecker"))
def test_only_gradients_cross_devices(family, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    update, x, kernel, dy = case(family, (16, 16), (16, 128), "float32")
    with jax.set_mesh(mesh):
        split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        x, dy = jax.device_put((x, dy), split)
        update, kernel = jax.device_put((update, kernel), whole)

        def everything(update, x, kernel, dy):
            return {how: outputs(update, x, kernel, dy, how)[:3] for how in ("fft", "dense", "fused")}

        program = jax.jit(everything).lower(update, x, kernel, dy).compile()
        results = program(update, x, kernel, dy)
    assert all(size < 16 * 16 for size in gathered_sizes(program.as_text()))
    M = np.asarray(update.to_dense(), np.float64)
    for y, by_update, by_x in results.values():
        assert_close(y, np.asarray(x, np.float64) @ (kernel + M), "float32")
        assert_close(by_x, np.asarray(dy, np.float64) @ (kernel + M).T, "float32")
        for name, leaf in by_update.arrays().items():
            assert_close(leaf, results["fft"][1].arrays()[name], "float32")


@pytest.mark.parametrize("how", ["auto", "fft", "dense"])
def test_half_precision_does_not_lose_a_small_update(how):
    # In bfloat16, 8 + 1e-4 is rounded to 8, so a sum of the kernel and the update would equal the kernel. All entries
    # of the kernel are 8 and each row of x sums to zero, so the product of x and the kernel is zero. The output must be
    # the product of x and the update.
    rng = np.random.default_rng(0)
    update = Circulant(jnp.asarray(1e-4 * rng.normal(size=64), jnp.float32), (64, 64))
    x = jnp.asarray(rng.permuted(np.tile([1.0, -1.0], (8, 32)), axis=1), jnp.bfloat16)
    y = jax.jit(updated_matmul, static_argnames="execution")(x, jnp.full((64, 64), 8.0, x.dtype), update, execution=how)
    assert y.dtype == jnp.bfloat16
    M = np.asarray(update.to_dense(), np.float64)
    expected = np.asarray(x, np.float64) @ (M if how == "fft" else np.asarray(jnp.asarray(M, x.dtype), np.float64))
    assert_close(y, expected, "bfloat16")


@pytest.mark.parametrize(("of_x", "of_kernel"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_auto_does_not_fold_where_x_and_kernel_differ(of_x, of_kernel):
    # Use the same x and kernel as in the test above. If the update were added to the kernel, it would vanish in
    # bfloat16, and keep only three digits in float32.
    rng = np.random.default_rng(0)
    update = Circulant(jnp.asarray(1e-4 * rng.normal(size=64), jnp.float32), (64, 64))
    x = jnp.asarray(rng.permuted(np.tile([1.0, -1.0], (8, 32)), axis=1), of_x)
    dot = lambda x, kernel: jnp.matmul(x.astype("float32"), kernel.astype("float32"))  # noqa: E731
    y = updated_matmul(x, jnp.full((64, 64), 8.0, of_kernel), update, dot=dot)
    assert y.dtype == jnp.float32
    M = np.asarray(update.to_dense().astype(of_x), np.float64)
    assert_close(y, np.asarray(x, np.float64) @ M, "float32")


def test_fused_is_refused_in_half_precision():
    x, kernel = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.bfloat16)
    with pytest.raises(UserError, match="'fused' adds the update to the kernel, and would lose it in bfloat16"):
        updated_matmul(x, kernel, Circulant(jnp.ones(4), (4, 4)), execution="fused")


def test_dot_is_used_for_every_product_with_a_kernel():
    calls = []

    def dot(x, kernel):
        calls.append(kernel.shape)
        return 2.0 * (x @ kernel)

    x, kernel, update = jnp.ones((2, 3)), jnp.ones((3, 3)), LowRank(jnp.ones((3, 1)), jnp.ones((1, 3)))
    np.testing.assert_allclose(updated_matmul(x, kernel, update, execution="fused", dot=dot), 12.0)
    np.testing.assert_allclose(updated_matmul(x, kernel, update, execution="fft", dot=dot), 9.0)
    assert calls == [(3, 3), (3, 3)]


@pytest.mark.parametrize("how", fast(["fft", "dense", "fused"], "dense"))
def test_a_product_of_another_dtype_than_its_input_has_gradients(how):
    update, x, kernel, _ = case("Circulant", batch=(4,), dtype="float32")
    dot = lambda x, kernel: jnp.matmul(x, kernel, preferred_element_type=jnp.bfloat16)  # noqa: E731
    y, pull = jax.vjp(lambda update: updated_matmul(x, kernel, update, execution=how, dot=dot), update)
    assert y.dtype == jnp.bfloat16
    expected = jax.vjp(lambda update: updated_matmul(x, kernel, update, execution="fft"), update)[1](jnp.ones((4, 8)))[
        0
    ]
    found = pull(jnp.ones_like(y))[0].c
    # The execution `dense` rounds to bfloat16 twice: first the gradient of the kernel, which is a product of this
    # `dot`, and then the sums of its diagonals.
    assert np.linalg.norm(found - expected.c) <= 2 * TOLERANCES["bfloat16"] * np.linalg.norm(expected.c)


def test_integers_are_refused():
    with pytest.raises(UserError, match="must be real floating point, not int32 and float32"):
        updated_matmul(jnp.ones((2, 3), "int32"), jnp.ones((3, 3)), Circulant(jnp.ones(3), (3, 3)))


def test_mistakes():
    x, kernel, update = jnp.ones((2, 3)), jnp.ones((3, 4)), CirculantPair(jnp.ones(4), jnp.ones(4), (3, 4))
    with pytest.raises(
        UserError, match=r"no execution is called 'fsed'.*did you mean 'fused'.*auto, fft, dense, fused"
    ):
        updated_matmul(x, kernel, update, execution="fsed")
    with pytest.raises(UserError, match=r"do not fit: \(2, 3\), \(4, 3\) and \(3, 4\)"):
        updated_matmul(x, kernel.T, update)
    with pytest.raises(UserError, match=r"do not fit: \(2, 4\), \(3, 4\) and \(3, 4\)"):
        updated_matmul(jnp.ones((2, 4)), kernel, update)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("family", fast(FAMILIES, "Circulant", "LowRank"))
def test_the_product_with_the_update_alone(family):
    update, x, _, dy = case(family)
    M = np.asarray(update.to_dense())

    def product(update, x, dy, how):
        y, pull = jax.vjp(lambda update, x: matmul(x, update, execution=how), update, x)
        return y, *pull(dy)

    results = jax.jit(lambda *args: {how: product(*args, how) for how in EXECUTIONS})(update, x, dy)
    _, expected, _ = results["fft"]
    for y, by_update, by_x in results.values():
        assert_close(y, x @ M)
        assert_close(by_x, dy @ M.T)
        for name, leaf in by_update.arrays().items():
            assert_close(leaf, expected.arrays()[name])


@pytest.mark.parametrize("how", EXECUTIONS)
def test_the_product_with_the_update_alone_keeps_the_dtype_of_half_precision_inputs(how):
    update, x, *_ = case("Circulant", (96, 96), (3, 50), "float32")
    half = x.astype("bfloat16")
    y = matmul(half, update, execution=how)
    assert y.dtype == jnp.bfloat16
    M = np.asarray(update.to_dense(), np.float64)
    # The execution `dense` rounds to the dtype of the input twice: first the dense matrix, and then the product.
    error = np.linalg.norm(np.asarray(y, np.float64) - np.asarray(half, np.float64) @ M)
    assert error <= 2 * TOLERANCES["bfloat16"] * np.linalg.norm(np.asarray(y, np.float64))


def test_dot_is_used_where_the_update_alone_is_formed():
    calls = []

    def dot(x, matrix):
        calls.append(matrix.shape)
        return 2.0 * (x @ matrix)

    x, update = jnp.ones((2, 3)), LowRank(jnp.ones((3, 1)), jnp.ones((1, 4)))
    np.testing.assert_allclose(matmul(x, update, execution="dense", dot=dot), np.full((2, 4), 6.0))
    np.testing.assert_allclose(matmul(x, update, execution="fft", dot=dot), np.full((2, 4), 3.0))
    assert calls == [(3, 4)]


def test_mistakes_of_the_product_with_the_update_alone():
    update = Circulant(jnp.ones(4), (3, 4))
    with pytest.raises(UserError, match=r"no execution is called 'fsed'.*did you mean 'fused'"):
        matmul(jnp.ones((2, 3)), update, execution="fsed")
    for how in ("fft", "dense", "fused"):
        for shape in ((2, 4), (2, 6), ()):
            with pytest.raises(UserError, match=r"matmul: x .* do not fit: \(.*\) and \(3, 4\)"):
                matmul(jnp.ones(shape), update, execution=how)
        with pytest.raises(UserError, match="matmul: x must be real floating point, not int32"):
            matmul(jnp.ones((2, 3), "int32"), update, execution=how)


@pytest.mark.parametrize("family", [Circulant, CirculantPair])
def test_layers_with_the_same_input_share_its_transform(family):
    updates = [family.init(jax.random.key(seed), (16, 16), scale=1.0) for seed in range(3)]
    x, kernel = jnp.ones((4, 16)), jnp.ones((16, 16))

    def outputs(updates, x):
        return [updated_matmul(x, kernel, update, execution="fft") for update in updates]

    transforms = jax.jit(outputs).lower(updates, x).compile().as_text().count("fft_type=RFFT")
    # One of x, and one of the vector of each update.
    assert transforms == 1 + 3


def test_inputs_with_explicitly_sharded_features(monkeypatch, width=64):
    monkeypatch.setattr(execution, "choose", lambda *_: "fft")  # Its fast product would fail here.
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    W, x = (jax.random.normal(jax.random.key(k), (2 if k else width, width)) for k in (0, 1))
    M = CirculantPair(*jax.random.normal(jax.random.key(2), (2, width)), shape=(width, width))
    with jax.set_mesh(mesh):
        split = jax.device_put(W, jax.P("tp", None)), jax.device_put(x, jax.P("fsdp", "tp"))
        y = updated_matmul(split[1], split[0], M, dot=lambda x, W: jnp.matmul(x, W, out_sharding=jax.P("fsdp", None)))
    np.testing.assert_allclose(y, x @ (W + M.to_dense()), rtol=1e-4, atol=1e-2)
