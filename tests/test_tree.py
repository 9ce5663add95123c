"""Tests of `surm_jax.tree`, and of the code on docs/trees.md."""

import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import surm_jax
from surm_jax import LoRA, Rule, UserError, tree
from surm_jax.peft import ABBA, BottleneckBranch, CirculantUpdate, DoRA, LoRAFix
from tests.peft.cases import UPDATES, is_quick
from tests.peft.models import MLP_SHAPES, MLP_TARGET, base, inputs, part_arrays, perturb, relative_error, same_bits

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "trees.md").read_text()
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)


def flat(params) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def noisy(adapter: tree.TreeAdapter, seed: int = 0) -> tree.TreeAdapter:
    """Return an adapter with noise added to all that it trains, as if after training."""
    rng = np.random.default_rng(seed)
    add = lambda trained, a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype) if trained else a  # noqa: E731
    return jax.tree.map(add, tree.mask(adapter), adapter)


class Attention(nn.Module):
    """A model with layers of Linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(8, name="up")(x)))


LINEN_RULES = [Rule("attention/(query|value)", CirculantUpdate(), axes="ioo"), Rule("up", LoRAFix(rank=2))]


@pytest.fixture(scope="module")
def linen():
    params = jax.jit(Attention().init)(jax.random.key(0), X)["params"]
    return params, tree.adapt(params, LINEN_RULES, train=["head/.*"], rng=0)


SLOW = [pytest.param(name, marks=[] if is_quick(name) else pytest.mark.exhaustive) for name in UPDATES]


@pytest.mark.parametrize("name", SLOW)
def test_a_tree_has_the_adapter_and_the_files_of_modules_with_its_paths(name, tmp_path):
    case = UPDATES[name]
    rules = [Rule(MLP_TARGET, dataclasses.replace(case.method, dropout=0))]
    model, adapter = surm_jax.adapt(base("mlp"), rules, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(base("mlp"), nnx.Param))
    new = tree.adapt(params, rules, rng=0)
    tree.save(tmp_path / "tree", params, new)
    surm_jax.save_adapter(tmp_path / "modules", model, adapter)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "tree" / file).read_bytes() == (tmp_path / "modules" / file).read_bytes()

    model = perturb(model, adapter)
    surm_jax.save_adapter(tmp_path / "modules", model, adapter)
    loaded = tree.load(tmp_path / "modules", params)
    effective, merged = flat(jax.jit(tree.apply)(params, loaded)), flat(tree.merge(params, loaded)[0])
    for path in MLP_SHAPES:
        kernel = np.asarray(flat(params)[f"{path}/kernel"], np.float64)
        expected = kernel + case.change(case.method.alpha, part_arrays(model, path, "delta"), kernel)
        assert relative_error(effective.pop(f"{path}/kernel"), expected) < 1e-5
        assert relative_error(merged[f"{path}/kernel"], expected) < 1e-5
    assert all(same_bits(array, flat(params)[path]) for path, array in effective.items())
    back, _ = surm_jax.load_adapter(tmp_path / "modules", base("mlp"))
    tree.save(tmp_path / "tree", params, loaded)
    again, _ = surm_jax.load_adapter(tmp_path / "tree", base("mlp"))
    assert same_bits(again(inputs("mlp")), back(inputs("mlp")))


def test_the_gradient_of_a_tree_is_that_of_modules(tmp_path):
    rules = [Rule(MLP_TARGET, DoRA(rank=2))]
    model, adapter = surm_jax.adapt(base("mlp"), rules, rngs=nnx.Rngs(0))
    surm_jax.save_adapter(tmp_path / "a", perturb(model, adapter), adapter)
    model, adapter = surm_jax.load_adapter(tmp_path / "a", base("mlp"))
    graphdef, params = nnx.split(base("mlp"), nnx.Param)
    params = nnx.to_pure_dict(params)

    def loss(adapter, params):
        return (nnx.merge(graphdef, tree.apply(params, adapter))(inputs("mlp")) ** 2).sum()

    gradients, of_base = jax.grad(loss, (0, 1))(tree.load(tmp_path / "a", params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_base))
    adapted, trainable, frozen = nnx.split(model, adapter.trainable, ...)
    expected = jax.grad(lambda t: (nnx.merge(adapted, t, frozen)(inputs("mlp")) ** 2).sum())(trainable)
    for path in MLP_SHAPES:
        for name, array in part_arrays(nnx.merge(adapted, expected, frozen), path, "delta").items():
            assert relative_error(gradients.parts[path][name], array) < 1e-5


def test_one_chain_trains_the_adapter_and_nothing_else(linen):
    params, adapter = linen
    optimizer = optax.masked(optax.adamw(0.03), tree.mask)

    def loss(adapter):
        return (Attention().apply({"params": tree.apply(params, adapter)}, X) ** 2).mean()

    assert float(loss(adapter)) == float((Attention().apply({"params": params}, X) ** 2).mean())

    @jax.jit
    def step(adapter, state):
        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, values, trained = optimizer.init(adapter), [], adapter
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == 1 + 2 * (2 * 2 * 8 + 2 * 8 + 8 * 3 + 3)
    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps as an integer.
            trained, state, value = step(trained, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 2
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapter, trained)
    assert moved == tree.mask(adapter)


def test_saved_loaded_and_merged_parameters_are_equal(linen, tmp_path):
    params, adapter = linen
    trained = noisy(adapter)
    tree.save(tmp_path / "a", params, trained)
    loaded = tree.load(tmp_path / "a", params)
    effective, again = (jax.jit(tree.apply)(params, a) for a in (trained, loaded))
    assert jax.tree.all(jax.tree.map(same_bits, effective, again))
    merged, deviation = tree.merge(params, loaded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, effective)
    assert deviation < 1e-7 and same_bits(merged["head"]["kernel"], trained.trained["head/kernel"])
    other = {**params, "up": {**params["up"], "kernel": params["up"]["kernel"] + 1}}
    with pytest.raises(UserError, match="up/kernel"):
        tree.save(tmp_path / "b", other, trained)
    with pytest.raises(UserError, match="up/kernel"):
        tree.load(tmp_path / "a", other)


def test_a_linen_adapter_is_loaded_by_the_attention_of_nnx(tmp_path):
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rules = [Rule("query", LoRA(rank=2), axes="ioo"), Rule("out", LoRA(rank=2), axes="iio")]
    adapter = noisy(tree.adapt(params, rules, rng=0))
    tree.save(tmp_path / "a", params, adapter)
    adapted, _ = surm_jax.load_adapter(tmp_path / "a", model)
    linen = nn.MultiHeadDotProductAttention(2)
    np.testing.assert_allclose(
        adapted(X), linen.apply({"params": tree.apply(params, adapter)}, X), rtol=1e-5, atol=1e-6
    )
    assert np.abs(adapted(X) - model(X)).max() > 1e-2


@dataclasses.dataclass
class Affine:
    """A layer as Equinox has them: a pytree with a weight (out, in)."""

    weight: jax.Array
    bias: jax.Array | None = None


jax.tree_util.register_dataclass(Affine)


def test_any_pytree_is_a_tree():
    W = jnp.arange(12.0).reshape(3, 4)
    for params, path, axes in (
        ({"mlp/~/linear": {"w": W}, "steps": jnp.zeros((), int)}, "mlp/~/linear/w", ""),
        ([Affine(W)], "0/weight", "oi"),
        ((np.asarray(W), {"delta": W}), "0", ""),
        ({"embed": {"embedding": W}}, "embed", ""),
    ):
        adapter = noisy(tree.adapt(params, [Rule(path, LoRA(rank=1), axes=axes)], rng=0))
        part = adapter.parts[path]
        change = part["down"] @ part["up"]
        kernel = flat(tree.apply(params, adapter))[path + "/embedding" * (path == "embed")]
        np.testing.assert_allclose(kernel, W + (change.T if axes == "oi" else change), rtol=1e-6)
        assert jax.tree.structure(tree.apply(params, adapter)) == jax.tree.structure(params)


def scanned(method, size=64, layers=6):
    """Return a stack of kernels with an adapter, and losses with the update outside and inside the body of the scan."""
    kernel = jax.random.normal(jax.random.key(0), (layers, size, size)) / 8
    params, x = {"layers": {"kernel": kernel}, "out": {"kernel": kernel[0]}}, jnp.ones((5, size))
    adapter = tree.adapt(params, [Rule("layers", method, axes="io"), Rule("out", method)], rng=0)

    def loss(body, layers, out):
        # Without `checkpoint`, the kernels that the body computes are kept for the backward pass.
        step = jax.checkpoint(lambda x, layer: (jnp.tanh(x @ body(layer)["kernel"]), None))
        y = jax.lax.scan(step, x, layers)[0]
        return ((y @ out["kernel"]) ** 2).sum()

    def outside(adapter, params):
        effective = tree.apply(params, adapter)
        return loss(lambda layer: layer, effective["layers"], effective["out"])

    def inside(adapter, params):
        stack, rest = adapter.divide("layers")
        return loss(lambda layer: tree.apply(*layer), (params["layers"], stack), tree.apply(params, rest)["out"])

    return params, noisy(adapter), outside, inside


def temporary(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_a_stack_is_adapted_in_the_body_of_its_scan_without_the_gradients_of_all_layers():
    params, adapter, outside, inside = scanned(CirculantUpdate())
    assert adapter.parts["layers"]["r1"].shape == (6, 64)
    left, right = jax.grad(outside)(adapter, params), jax.grad(inside)(adapter, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), left, right)
    kernels = params["layers"]["kernel"].nbytes
    assert temporary(jax.grad(outside), adapter, params) > 2 * kernels  # W + M, and all their gradients
    assert temporary(jax.grad(inside), adapter, params) < 0.6 * kernels  # those of one or two layers


@pytest.mark.parametrize("method", [LoRA(rank=2), CirculantUpdate()], ids=lambda method: method.name)
def test_the_gradients_of_kernels_are_reduced_at_once(method):
    params = {str(k): {"kernel": jax.random.normal(jax.random.key(k), (64, 64))} for k in range(8)}
    adapter = tree.adapt(params, [Rule(".", method)], rng=0)

    def loss(adapter, params):
        x, params = jnp.ones((5, 64)), tree.apply(params, adapter)
        for k in range(8):
            x = jnp.tanh(x @ params[str(k)]["kernel"])
        return (x**2).sum()

    # One copy of the adapted kernels, and at most two more arrays of the size of one kernel.
    assert temporary(jax.grad(loss), adapter, params) < (8 + 2) * 64 * 64 * 4


def test_trees_that_cannot_be_adapted_are_refused():
    W = jnp.ones((4, 4))
    params = {"a": {"kernel": W}, "h": {"kernel": W.astype(jnp.bfloat16)}, "n": {"kernel": jnp.ones((2, 4, 4))}}
    for rule, message in (
        (Rule("b", LoRA()), "'b'"),
        (Rule("h", LoRA()), "bfloat16 would round the update away"),
        (Rule("n", LoRA()), "does not say which axes are rows and columns"),
        (Rule("a", LoRA(dropout=0.1)), "dropout=0.1"),
        (Rule("a", BottleneckBranch()), "has no modules: use a method that updates kernels"),
        (Rule("a", ABBA(rank=9)), "rank"),
    ):
        with pytest.raises(UserError, match=message):
            tree.adapt(params, [rule], rng=0)
    with pytest.raises(UserError, match="x must be an array, got 3"):
        tree.adapt({"x": 3, "a": {"kernel": W}}, [Rule("a", LoRA())], rng=0)
    with pytest.raises(UserError, match="two arrays of the tree have the same path"):
        tree.adapt({"a/b": W, "a": {"b": W}}, [Rule("a/b", LoRA())], rng=0)
    with pytest.raises(UserError, match="a is both an array and a node"):
        tree.adapt({"a": W, "a/b": W}, [Rule("a/b", LoRA())], rng=0)
    adapter = tree.adapt(params, [Rule("a", LoRA(rank=1))], train=["n/.*"], rng=0)
    for others, message in (
        ({"a": {"kernel": W}}, "the tree has no n/kernel"),
        ({"n": params["n"]}, "the tree has no a/kernel"),
        ({**params, "n": {"kernel": W}}, r"n/kernel has the shape \(4, 4\), but the adapter trained \(2, 4, 4\)"),
        (
            {**params, "a": {"kernel": jnp.ones((4, 5))}},
            r"a/kernel has the shape \(4, 5\), but the update was made for .* \(4, 4\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            tree.apply(others, adapter)
    with pytest.raises(UserError, match="the adapter changes nothing in 'h'"):
        adapter.divide("h")


def test_abstract_trees_are_adapted_without_memory():
    params = {"a": {"kernel": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}}
    adapter = jax.eval_shape(lambda: tree.adapt(params, [Rule("a", LoRA(rank=2))], rng=0))
    assert adapter.parts["a"]["down"].shape == (2**20, 2)


def test_the_code_of_the_page_runs():
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(programs) == 2
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax and Linen need them
        for program in programs:
            exec(program, names)
    first, last = names["losses"][0], names["losses"][-1]
    assert last < first / 2
    np.testing.assert_allclose(
        names["model"].apply({"params": names["merged"]}, names["x"]),
        names["model"].apply({"params": tree.apply(names["params"], names["adapter"])}, names["x"]),
        rtol=1e-4,
        atol=1e-5,
    )
    stacked = names["stacked"]
    np.testing.assert_allclose(
        names["inside"](stacked, names["frozen"]), names["outside"](stacked, names["frozen"]), rtol=1e-5
    )
