"""Tests of `Bert` and its configuration.

The outputs are compared with an implementation of the published architecture in NumPy (`oracle`).
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax import CirculantUpdate, LoRA, Rule, adapt, merge
from surm_jax.errors import UserError
from surm_jax.models import TARGETS, Bert, BertConfig
from surm_jax.peft import AdapterParam, iter_parts
from tests.peft.models import materialize, parameters, perturb, relative_error
from tests.speeds import fast

# The number of parameters of each variant with a pooler and without a head, as in `BertModel` of transformers.
SIZES = {
    "tiny": 4_385_920,
    "mini": 11_170_560,
    "small": 28_763_648,
    "medium": 41_373_184,
    "base": 109_482_240,
    "large": 335_141_888,
}

# The dimensions of each array of parameters have different sizes, except in square kernels. So a wrong transposition
# makes a test fail.
TINY = {
    "vocab_size": 23,
    "width": 12,
    "depth": 2,
    "heads": 3,
    "mlp_width": 20,
    "max_positions": 14,
    "type_vocab_size": 2,
    "num_classes": 5,
}
ROBERTA = {"positions": "after_padding", "pad_token": 3, "epsilon": 1e-5, "type_vocab_size": 1}
# Fields of three configurations. Together, their models run every branch of the code.
MODELS = {
    "classifier": {},
    "mlm": {"head": "mlm", "activation": "gelu_tanh", **ROBERTA},
    "no pooler": {"pooler": False, "activation": "relu", "epsilon": 0.1},
}

BATCH, TOKENS = 3, 9
LENGTHS = (9, 5, 2)


@functools.cache
def tiny(**overrides):
    """Return a tiny model with random parameters. All tests share it, so they must not change it."""
    return materialize(lambda: Bert(BertConfig(**{**TINY, **overrides}), rngs=nnx.Rngs(0)))


def abstract(config):
    return nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))


def shapes(config):
    return {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(abstract(config)))}


def batch(pad_token=0):
    """Return the tokens, mask and token types of a batch of three sentences, two of which are padded."""
    rng = np.random.default_rng(1)
    mask = np.arange(TOKENS)[None] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(4, TINY["vocab_size"], (BATCH, TOKENS)), pad_token)
    types = np.where(mask, np.arange(TOKENS)[None] > 2, 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.asarray(types, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens, mask, types, key):
    model = nnx.merge(graphdef, state)
    options = {"mask": mask, "token_types": types, "rngs": key}
    return model(tokens, **options), model.hidden_states(tokens, **options)


def run(model, tokens, mask=None, types=None, key=None):
    """Return the logits and the hidden states of the model, computed under `jax.jit`."""
    return _run(*nnx.split(model), tokens, mask, types, key)


def layer_norm(x, p, path, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p[f"{path}/scale"] + p[f"{path}/bias"]


ORACLE_ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def oracle(model, tokens, mask, types):
    """Return the logits and hidden states of the published architecture, computed in NumPy loops in float64.

    Args:
        model: The model whose configuration and parameters are used.
        tokens: The tokens, (batch, tokens).
        mask: True for tokens that are not padding, (batch, tokens).
        types: The segment type of each token, (batch, tokens).
    """
    c = model.config
    p = {path: value.astype(np.float64) for path, value in parameters(model).items()}
    activation = ORACLE_ACTIVATIONS[c.activation]
    logits, hidden = [], []
    for sentence, kept, segments in zip(np.asarray(tokens), np.asarray(mask), np.asarray(types), strict=True):
        rows, position = [], c.pad_token
        for index, (token, segment) in enumerate(zip(sentence, segments, strict=True)):
            if c.positions == "after_padding":
                position += token != c.pad_token
                index = c.pad_token if token == c.pad_token else position
            rows.append(p["word_embed/embedding"][token] + p["position_embed/embedding"][index])
            rows[-1] = rows[-1] + p["type_embed/embedding"][segment]
        x = layer_norm(np.stack(rows), p, "embed_norm", c.epsilon)
        states = [x]
        for block in (f"blocks/{i}" for i in range(c.depth)):
            out = np.zeros_like(x) + p[f"{block}/attention/out/bias"]
            for head in range(c.heads):
                q, k, v = (
                    x @ p[f"{block}/attention/{name}/kernel"][:, head] + p[f"{block}/attention/{name}/bias"][head]
                    for name in ("query", "key", "value")
                )
                weights = np.exp(q @ k.T / np.sqrt(c.width // c.heads)) * kept
                out += weights / weights.sum(-1, keepdims=True) @ v @ p[f"{block}/attention/out/kernel"][head]
            x = layer_norm(x + out, p, f"{block}/norm1", c.epsilon)
            inner = activation(x @ p[f"{block}/mlp/up/kernel"] + p[f"{block}/mlp/up/bias"])
            y = inner @ p[f"{block}/mlp/down/kernel"] + p[f"{block}/mlp/down/bias"]
            x = layer_norm(x + y, p, f"{block}/norm2", c.epsilon)
            states.append(x)
        if c.head == "mlm":
            x = activation(x @ p["head/transform/kernel"] + p["head/transform/bias"])
            x = layer_norm(x, p, "head/norm", c.epsilon) @ p["word_embed/embedding"].T + p["head/bias"]
        else:
            x = np.tanh(x[0] @ p["pooler/kernel"] + p["pooler/bias"]) if c.pooler else x[0]
            x = x @ p["head/kernel"] + p["head/bias"]
        logits.append(x)
        hidden.append(np.stack(states))
    return np.stack(logits), np.stack(hidden, axis=1)


class TestGeometry:
    def test_every_variant_has_a_golden_size(self):
        assert SIZES.keys() == BertConfig.VARIANTS.keys()

    @pytest.mark.parametrize("variant", fast(SIZES))
    def test_golden_size(self, variant):
        found = shapes(BertConfig.from_variant(variant, num_classes=3))
        assert sum(v.size for path, v in found.items() if not path.startswith("head/")) == SIZES[variant]

    @pytest.mark.parametrize("head", ["classifier", "mlm"])
    def test_parameter_paths_shapes_and_dtypes(self, head):
        linears = {"attention/query": (12, 3, 4), "attention/key": (12, 3, 4), "attention/value": (12, 3, 4)}
        linears |= {"attention/out": (3, 4, 12), "mlp/up": (12, 20), "mlp/down": (20, 12)}
        rows = {"word_embed": 23, "position_embed": 14, "type_embed": 2}
        body = {f"{name}/embedding": (count, 12) for name, count in rows.items()}
        body |= {f"blocks/{i}/{name}/kernel": shape for i in range(2) for name, shape in linears.items()}
        biases = {name: shape[1:] for name, shape in linears.items()} | {"attention/out": (12,)}
        body |= {f"blocks/{i}/{name}/bias": shape for i in range(2) for name, shape in biases.items()}
        norms = ["embed_norm", *(f"blocks/{i}/{name}" for i in range(2) for name in ("norm1", "norm2"))]
        if head == "mlm":
            body |= {"head/transform/kernel": (12, 12), "head/transform/bias": (12,)}
            exact = {"head/bias": (23,)}
            norms.append("head/norm")
        else:
            exact = {"pooler/kernel": (12, 12), "pooler/bias": (12,), "head/kernel": (12, 5), "head/bias": (5,)}
        exact |= {f"{norm}/{leaf}": (12,) for norm in norms for leaf in ("scale", "bias")}
        found = shapes(BertConfig(**TINY, head=head, param_dtype="bfloat16"))
        expected = {path: (shape, jnp.bfloat16) for path, shape in body.items()}
        expected |= {path: (shape, jnp.float32) for path, shape in exact.items()}
        assert {path: (v.shape, v.dtype) for path, v in found.items()} == expected
        assert {v.dtype for v in shapes(BertConfig(**TINY, head=head)).values()} == {jnp.dtype("float32")}

    def test_without_a_pooler(self):
        with_one, without = shapes(BertConfig(**TINY)), shapes(BertConfig(**TINY, pooler=False))
        assert with_one.keys() - without.keys() == {"pooler/kernel", "pooler/bias"}


class TestConfig:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"heads": 5}, "5 heads for width 12"),
            ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
            ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
            ({"head": "classify"}, "did you mean 'classifier'"),
            ({"positions": "relative"}, r"one of \('absolute', 'after_padding'\), got 'relative'"),
            ({"activation": "gelu_new"}, "did you mean 'gelu"),
            ({"pad_token": 23}, "pad_token must be a token of the vocabulary, 0 to 22, got 23"),
            ({"pad_token": -1}, "0 to 22, got -1"),
            ({"positions": "after_padding", "pad_token": 13}, "max_positions must be above 14.* got 14"),
            ({"epsilon": 0.0}, "epsilon must be positive"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
            ({"param_dtype": "float16"}, "did you mean"),
        ],
    )
    def test_mistakes(self, overrides, message):
        with pytest.raises(UserError, match=message):
            BertConfig(**{**TINY, **overrides})

    def test_unknown_variant_and_field(self):
        with pytest.raises(UserError, match="did you mean 'base'"):
            BertConfig.from_variant("bse")
        with pytest.raises(UserError, match="did you mean 'vocab_size'"):
            BertConfig.from_variant("tiny", vocabsize=9)

    def test_max_tokens(self):
        assert BertConfig(**TINY).max_tokens == 14
        assert BertConfig(**{**TINY, **ROBERTA}).max_tokens == 10  # The positions of tokens are 4 to 13.


class TestForward:
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_the_published_architecture(self, name):
        model = tiny(**MODELS[name])
        tokens, mask, types = batch(model.config.pad_token)
        types = jnp.minimum(types, model.config.type_vocab_size - 1)
        logits, hidden = run(model, tokens, mask, types)
        expected_logits, expected_hidden = oracle(model, tokens, mask, types)
        assert logits.shape == ((BATCH, TOKENS, 23) if model.config.head == "mlm" else (BATCH, 5))
        assert len(hidden) == 3
        assert relative_error(logits, expected_logits) < 1e-5
        for ours, theirs in zip(hidden, expected_hidden, strict=True):
            assert relative_error(ours, theirs) < 1e-5

    def test_defaults_are_all_tokens_and_type_zero(self):
        model, (tokens, _, _) = tiny(), batch()
        expected, _ = oracle(model, tokens, np.ones(tokens.shape), np.zeros(tokens.shape, int))
        assert relative_error(run(model, tokens)[0], expected) < 1e-5

    def test_padding_is_not_looked_at(self):
        model, (tokens, mask, types) = tiny(), batch()
        noise = jnp.where(mask, tokens, 7)
        # Pass the mask as integers, as tokenizers return it. Other tests pass booleans.
        hidden = run(model, tokens, mask.astype(jnp.int32), types)[1]
        for before, after in zip(hidden, run(model, noise, mask.astype(jnp.int32), types)[1], strict=True):
            np.testing.assert_allclose(after[mask], before[mask], rtol=1e-6, atol=1e-6)
        assert relative_error(run(model, noise)[0], run(model, tokens)[0]) > 1e-2

    @pytest.mark.parametrize(
        ("tokens", "options", "message"),
        [
            (jnp.zeros((2, 15), jnp.int32), {}, "positions for 14 tokens, got sequences of 15"),
            (jnp.zeros(9, jnp.int32), {}, r"integers \(batch, tokens\), got int32 \(9,\)"),
            (jnp.zeros((2, 9)), {}, r"got float32 \(2, 9\)"),
            (jnp.zeros((2, 9), jnp.int32), {"mask": jnp.ones((9, 9), bool)}, r"mask .* \(2, 9\), got bool \(9, 9\)"),
            (jnp.zeros((2, 9), jnp.int32), {"mask": jnp.zeros((2, 9))}, "mask must be booleans or integers"),
            (jnp.zeros((2, 9), jnp.int32), {"token_types": jnp.zeros((2, 8), jnp.int32)}, "token_types must be int"),
        ],
    )
    def test_wrong_inputs(self, tokens, options, message):
        with pytest.raises(UserError, match=message):
            tiny()(tokens, **options)

    @pytest.mark.parametrize(
        ("name", "dtypes"),
        [("classifier", {"dtype": "bfloat16"}), ("mlm", {"dtype": "bfloat16", "param_dtype": "bfloat16"})],
    )
    def test_bfloat16_is_near_float32(self, name, dtypes):
        model = tiny(**MODELS[name], **dtypes)
        tokens, mask, _ = batch(model.config.pad_token)
        exact, _ = oracle(tiny(**MODELS[name]), tokens, mask, np.zeros(tokens.shape, int))
        logits, hidden = run(model, tokens, mask)
        assert logits.dtype == jnp.float32
        assert {state.dtype for state in hidden} == {jnp.dtype("bfloat16")}
        # The error must have the size of rounding errors in bfloat16, which has 8 bits. A smaller error would mean that
        # the model computes in float32.
        assert 1e-4 < relative_error(logits, exact) < 0.05

    @pytest.mark.parametrize("name", fast(["classifier", "mlm"]))
    def test_gradients_reach_every_parameter_and_are_finite_even_of_padding_alone(self, name):
        graphdef, state = nnx.split(tiny(**MODELS[name]))
        tokens, mask, types = batch(3)
        options = {"mask": mask.at[0].set(False), "token_types": types}
        gradients = jax.jit(jax.grad(lambda s: jnp.square(nnx.merge(graphdef, s)(tokens, **options)).sum()))(state)
        for path, variable in nnx.to_flat_state(gradients):
            gradient = np.asarray(variable[...])
            assert np.isfinite(gradient).all(), path
            # The bias of the keys has no gradient: it adds the same number to all scores of a query, and the softmax
            # does not depend on this number.
            if path[-2:] != ("key", "bias"):
                assert gradient.any(), path


class TestDropout:
    def test_the_key_decides(self):
        inputs = batch()
        exact = run(tiny(depth=1), *inputs)
        model = tiny(depth=1, dropout=0.5)
        first, again, other = (run(model, *inputs, jax.random.key(seed)) for seed in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        for a, b, c in zip(*map(jax.tree.leaves, (first, other, exact)), strict=True):
            assert relative_error(a, b) > 1e-3
            assert relative_error(a, c) > 1e-3
        jax.tree.map(np.testing.assert_array_equal, run(model, *inputs), exact)

    def test_rngs_give_a_new_key_each_time(self):
        @jax.jit
        def twice(state):
            model, rngs = nnx.merge(graphdef, state), nnx.Rngs(dropout=0)
            return [model.hidden_states(batch()[0], rngs=rngs)[0] for _ in range(2)]

        graphdef, state = nnx.split(tiny(dropout=0.5))
        first, second = twice(state)
        assert relative_error(first, second) > 1e-3

    def test_every_place_draws_with_a_key_of_its_own(self, monkeypatch):
        keys = []
        monkeypatch.setattr("surm_jax.models.bert.drop", lambda dropout, x, key: (keys.append(key), x)[1])

        @jax.jit
        def drawn_keys(state):
            nnx.merge(graphdef, state)(batch()[0], rngs=jax.random.key(0))
            return [jax.random.key_data(key) for key in keys]

        graphdef, state = nnx.split(tiny())
        drawn = {tuple(key.tolist()) for key in drawn_keys(state)}
        assert len(drawn) == len(keys) == 2 + 2 * TINY["depth"]

    def test_modules_hold_parameters_alone(self):
        assert all(isinstance(v, nnx.Param) for _, v in nnx.to_flat_state(nnx.state(tiny(dropout=0.5))))


class TestAdaptersAndRemat:
    @pytest.mark.parametrize(
        ("name", "per_block"), [("qkv", 3), ("qv", 2), ("attention", 4), ("mlp", 2), ("all-linear", 6)]
    )
    def test_targets_select_linear_layers_of_every_block(self, name, per_block):
        model, _ = adapt(tiny(), [Rule(TARGETS[name], LoRA())], rngs=nnx.Rngs(1))
        adapted = [path for path, *_ in iter_parts(model)]
        assert len(adapted) == 2 * per_block
        assert all(re.fullmatch(TARGETS[name], path) for path in adapted)

    def test_every_target_preset_is_tested(self):
        assert TARGETS.keys() == {"qkv", "qv", "attention", "mlp", "all-linear", "houlsby", "pfeiffer"}

    @pytest.mark.exhaustive
    def test_updates_start_at_zero_count_and_merge(self):
        inputs = batch()
        base = tiny()
        model, adapter = adapt(
            base, [Rule(TARGETS["all-linear"], CirculantUpdate())], train=["(pooler|head)/.*"], rngs=nnx.Rngs(1)
        )
        expected = run(base, *inputs)[0]
        assert relative_error(run(model, *inputs)[0], expected) < 1e-6
        model = perturb(model, adapter)
        changed = run(model, *inputs)[0]
        assert relative_error(changed, expected) > 1e-2
        assert relative_error(run(merge(model)[0], *inputs)[0], changed) < 1e-5

    def test_an_update_of_the_embeddings_reaches_the_tied_head(self):
        tokens, base = batch()[0], tiny(**MODELS["mlm"])
        model, adapter = adapt(base, [Rule("word_embed", LoRA())], rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        changed = run(model, tokens)[0]
        assert relative_error(changed, run(base, tokens)[0]) > 1e-2
        assert relative_error(run(merge(model)[0], tokens)[0], changed) < 1e-5

    @pytest.mark.exhaustive
    def test_rematerialised_blocks_have_the_same_values_and_gradients(self):
        tokens, mask, types = batch()

        def build(remat):
            model, adapter = adapt(
                tiny(dropout=0.3, remat=remat, depth=1), [Rule(TARGETS["qkv"], LoRA())], rngs=nnx.Rngs(1)
            )
            graphdef, arrays, frozen = nnx.split(perturb(model, adapter), AdapterParam, ...)

            def total(arrays):
                model = nnx.merge(graphdef, arrays, frozen)
                logits = model(tokens, mask=mask, token_types=types, rngs=jax.random.key(3))
                return jnp.square(logits).sum()

            return total, arrays

        (plain, arrays), (again, _) = build("none"), build("block")
        value, gradient = jax.jit(jax.value_and_grad(plain))(arrays)
        remat_value, remat_gradient = jax.jit(jax.value_and_grad(again))(arrays)
        np.testing.assert_allclose(remat_value, value, rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(remat_gradient), jax.tree.leaves(gradient), strict=True):
            assert relative_error(ours, theirs) < 1e-5
        equations = [jax.make_jaxpr(total)(arrays).jaxpr.eqns for total in (plain, again)]
        names = [[equation.primitive.name for equation in group] for group in equations]
        assert [group.count("remat2") for group in names] == [0, 1]


def test_initialisation():
    config = BertConfig(**{**TINY, "width": 96, "depth": 1, "mlp_width": 384, "vocab_size": 200, "head": "mlm"})
    state = jax.jit(lambda: nnx.state(Bert(config, rngs=nnx.Rngs(0))))()
    for path, variable in nnx.to_flat_state(state):
        values = np.asarray(variable[...])
        if path[-1] == "bias":
            assert not values.any(), path
        elif path[-1] == "scale":
            assert (values == 1).all(), path
        else:
            np.testing.assert_allclose(values.std(), 0.02, rtol=0.1, err_msg=str(path))
