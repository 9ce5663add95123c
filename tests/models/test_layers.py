"""Compare the layers that all transformers share with their definitions, computed by NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from surm_jax.models.layers import (
    ACTIVATIONS,
    MLP,
    REMAT,
    Attention,
    Blocks,
    RMSNorm,
    call_block,
    drop,
    rotate,
    softcap,
    split_block_keys,
    split_key,
)

ORACLES = {
    "gelu": lambda x: x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * scipy.special.expit(1.702 * x),
    "silu": lambda x: x * scipy.special.expit(x),
    "relu": lambda x: np.maximum(x, 0),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def materialize(make):
    """Build a module with `make`, and give it random parameters from NumPy."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    flat = [
        (path, v.copy(jnp.asarray(0.5 * rng.standard_normal(v.shape), v.dtype))) for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def arrays(module):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(module))}


def apply(module, *inputs):
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(state, *inputs)


def attention(**options):
    return materialize(
        lambda: Attention(12, 3, **{"dtype": "float32", "param_dtype": "float32"} | options, rngs=nnx.Rngs(0))
    )


def attention_oracle(a, x, mask):
    """Return the output of attention, computed by its definition in loops over the sequences, heads and queries.

    Args:
        a: The parameters of the module by path.
        x: The features of the tokens, (batch, tokens, 12).
        mask: True for tokens that queries attend to, (batch, tokens).
    """
    y = np.zeros(x.shape)
    for b, h, i in np.ndindex(len(x), 3, x.shape[1]):
        tokens = x[b][mask[b]]
        q = x[b, i] @ a["query/kernel"][:, h] + a.get("query/bias", np.zeros((3, 4)))[h]
        keys = tokens @ a["key/kernel"][:, h] + a.get("key/bias", np.zeros((3, 4)))[h]
        values = tokens @ a["value/kernel"][:, h] + a.get("value/bias", np.zeros((3, 4)))[h]
        y[b, i] += scipy.special.softmax(keys @ q / 2.0) @ values @ a["out/kernel"][h]
    return y + a.get("out/bias", np.zeros(12))


class TestAttention:
    @pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "out_bias": False}])
    def test_is_its_definition_over_the_tokens_of_the_mask(self, options):
        module, x = attention(**options), normal(1, 2, 5, 12)
        mask = np.array([[True, True, True, True, True], [True, False, True, True, False]])
        assert any(path.endswith("bias") for path in arrays(module)) == (options == {})
        for given, meant in ((mask, mask), (None, np.ones_like(mask))):
            y = apply(module, jnp.asarray(x, jnp.float32), given)
            np.testing.assert_allclose(y, attention_oracle(arrays(module), x, meant), rtol=1e-4, atol=1e-5)

    def test_masked_tokens_change_nothing(self):
        module, x = attention(), normal(1, 1, 5, 12).astype(np.float32)
        mask = np.array([[True, True, True, False, False]])
        other = x + np.where(mask, 0, 7)[..., None].astype(np.float32)
        np.testing.assert_array_equal(apply(module, x, mask)[:, :3], apply(module, other, mask)[:, :3])

    def test_dtypes(self):
        module = attention(dtype="bfloat16", param_dtype="bfloat16")
        assert {array.dtype for array in arrays(module).values()} == {jnp.dtype("bfloat16")}
        x = normal(1, 2, 5, 12)
        y = apply(module, jnp.asarray(x, jnp.bfloat16), np.ones((2, 5), bool))
        assert y.dtype == jnp.bfloat16
        a = {path: array.astype(np.float64) for path, array in arrays(module).items()}
        expected = attention_oracle(a, x, np.ones((2, 5), bool))
        assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= 2e-2 * np.linalg.norm(expected)


class TestMLP:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_is_its_definition(self, activation):
        options = {"activation": activation, "dropout": 0.0, "dtype": "float32", "param_dtype": "float32"}
        module, x = materialize(lambda: MLP(6, 9, **options, rngs=nnx.Rngs(0))), normal(1, 2, 3, 6)
        a = arrays(module)
        expected = ORACLES[activation](x @ a["up/kernel"] + a["up/bias"]) @ a["down/kernel"] + a["down/bias"]
        np.testing.assert_allclose(apply(module, jnp.asarray(x, jnp.float32), None), expected, rtol=1e-5, atol=1e-5)

    def test_dropout_is_between_the_layers(self):
        options = {"activation": "relu", "dropout": 0.5, "dtype": "float32", "param_dtype": "float32"}
        module, x = materialize(lambda: MLP(6, 9, **options, rngs=nnx.Rngs(0))), normal(1, 1, 1, 6)
        a, key = arrays(module), jax.random.key(3)
        hidden = np.maximum(x @ a["up/kernel"] + a["up/bias"], 0)
        kept = np.asarray(drop(nnx.Dropout(0.5), jnp.ones((1, 1, 9)), key))
        assert set(kept.ravel()) == {0.0, 2.0}
        expected = (hidden * kept) @ a["down/kernel"] + a["down/bias"]
        np.testing.assert_allclose(apply(module, jnp.asarray(x, jnp.float32), key), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype):
    x = jnp.linspace(-5, 5, 101, dtype=dtype)
    y = ACTIVATIONS[name](x)
    assert y.dtype == x.dtype
    expected = ORACLES[name](np.asarray(x, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_computed_in_float32(offset):
    x, scale = normal(0, 2, 3, 8), normal(1, 8)
    module = RMSNorm(8, epsilon=0.1, offset=offset, param_dtype="bfloat16")
    np.testing.assert_array_equal(np.asarray(module.scale[...], float) + offset, np.ones(8))
    module.scale[...] = jnp.asarray(scale, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), float)
    expected = rounded / np.sqrt((rounded**2).mean(-1, keepdims=True) + 0.1)
    expected = expected * (np.asarray(module.scale[...], float) + offset)
    y = module(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, float), expected, rtol=2.0**-8)  # Only the result is rounded.


def test_rotated_heads_depend_only_on_the_distance():
    q, k = (jnp.asarray(normal(seed, 1, 1, 2, 6), jnp.float32) for seed in (0, 1))

    def score(first, second):
        angles = [jnp.asarray([[[position * f for f in (1.0, 0.3, 0.1)]]]) for position in (first, second)]
        a, b = (rotate(x, jnp.stack([jnp.cos(t), jnp.sin(t)])) for x, t in zip((q, k), angles, strict=True))
        return np.asarray((a * b).sum(-1))

    np.testing.assert_allclose(score(7, 4), score(3, 0), rtol=1e-4, atol=1e-5)
    assert np.abs(score(7, 4) - score(7, 5)).max() > 0.1
    np.testing.assert_array_equal(rotate(q, None), q)


def test_softcap():
    x = jnp.asarray([-100.0, 0.1, 100.0])
    np.testing.assert_allclose(softcap(x, 3.0), 3 * np.tanh(np.asarray(x) / 3), rtol=1e-6)
    np.testing.assert_array_equal(softcap(x, 0.0), x)


def test_split_key():
    assert split_key(None, 3) == (None, None, None)
    keys = split_key(jax.random.key(0), 3)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


def test_split_block_keys():
    assert split_block_keys(None, 3) == (None, None)
    first, keys = split_block_keys(jax.random.key(0), 3)
    drawn = [tuple(jax.random.key_data(key).tolist()) for key in (first, *keys)]
    assert drawn == [tuple(jax.random.key_data(key).tolist()) for key in split_key(jax.random.key(0), 4)]


class TestBlocks:
    def test_each_reads_what_the_one_before_it_made(self):
        blocks = Blocks([Add(1.0), Add(2.0)])
        x, keys = jnp.ones((1, 2, 3)), jax.random.split(jax.random.key(0), 2)
        states = blocks.run(x, jnp.full((1, 2, 3), 10.0), keys=keys, remat="none", every=True)
        assert [float(state[0, 0, 0]) for state in states] == [1, 12, 24]
        (last,) = blocks.run(x, jnp.full((1, 2, 3), 10.0), keys=keys, remat="block", every=False)
        np.testing.assert_array_equal(last, states[-1])
        with pytest.raises(AssertionError):
            blocks.run(x, x, keys=None, remat="none", every=True)


class Add(nnx.Module):
    def __init__(self, number):
        self.number = number

    def __call__(self, x, y, key):
        assert key is not None
        return x + y + self.number


class TestCallBlock:
    def test_same_values_and_gradients_from_the_arguments_alone(self):
        graphdef, state = nnx.split(attention())
        x, mask = jnp.asarray(normal(1, 2, 5, 12), jnp.float32), jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])

        def loss(state, x, remat):
            return call_block(nnx.merge(graphdef, state), x, mask, policy=REMAT[remat]).sum()

        gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        plain, *again = (jax.tree.leaves(gradient(state, x, remat)) for remat in REMAT)
        for policy in again:
            for one, other in zip(plain, policy, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
        # With the policy "block", the forward pass stores the parameters and arguments of the block, and no
        # intermediate result.
        kept = {remat: _residuals(loss, state, x, remat) for remat in REMAT}
        assert kept["block"] <= sum(leaf.size for leaf in jax.tree.leaves(state)) + x.size + mask.size
        # With the policy "dots", it also stores queries, keys and values, but no attention scores.
        assert kept["dots"] == kept["block"] + 3 * x.size
        assert kept["dots"] < kept["none"]

    def test_without_key(self):
        block = MLP(6, 9, activation="relu", dropout=0.5, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
        x = jnp.ones((1, 2, 6))
        np.testing.assert_allclose(call_block(block, x, None, policy=REMAT["block"]), block(x, None), rtol=1e-6)


def _residuals(loss, state, x, remat):
    """Return the number of entries of the arrays that the forward pass of `loss` stores for the backward pass."""
    _, backward = jax.vjp(lambda state, x: loss(state, x, remat), state, x)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))
