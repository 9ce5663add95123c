"""Tests of `Decoder` and its cache. The outputs are compared with the published architectures in NumPy (`oracle`)."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax import LoRA, Rule, adapt, merge
from surm_jax.errors import UserError
from surm_jax.models import Cache, Decoder, DecoderConfig
from surm_jax.models.decoder_config import rope_frequencies
from surm_jax.peft import CirculantUpdate, iter_parts
from surm_jax.training.blocks import as_parts, runs_of
from surm_jax.training.partition import partition
from tests.peft.models import materialize, parameters, perturb, relative_error
from tests.speeds import fast

# The dimensions of each array of parameters have different sizes. So a wrong transposition makes a test fail.
TINY = {
    "vocab_size": 23,
    "width": 12,
    "depth": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 10,
    "mlp_width": 20,
    "max_positions": 32,
    "epsilon": 1e-3,
    "rope_theta": 50.0,
}
# Fields of configurations. Together, their models run every branch of the code.
MODELS = {
    "llama": {"tied_head": True, "rope_type": "llama3", "rope_factor": 4.0, "rope_positions": 16},
    "qwen": {"qkv_bias": True, "qk_norm": True, "layer_pattern": "GLL", "window": 3, "mlp_bias": True},
    "gemma": {
        "tied_head": True,
        "out_bias": True,
        "qk_norm": True,
        "post_norms": True,
        "unit_offset": True,
        "scaled_embed": True,
        "score_width": 7,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "layer_pattern": "LG",
        "window": 4,
        "rope_type": "linear",
        "rope_factor": 2.0,
        "local_rope_theta": 5.0,
        "activation": "gelu_tanh",
    },
}
# Two texts and padding in one row, a text that is padded at the left, and one with padding inside.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 3], [1, 1, 0, 1, 1, 1, 1, 1, 1]])
TOKENS = np.random.default_rng(1).integers(0, TINY["vocab_size"], SEGMENTS.shape)


@functools.cache
def tiny(name="llama", **overrides):
    """Return a tiny model with random parameters. All tests share it, so they must not change it."""
    return materialize(lambda: Decoder(DecoderConfig(**{**TINY, **MODELS[name], **overrides}), rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens, segments, key):
    model = nnx.merge(graphdef, state)
    options = {"segments": segments, "rngs": key}
    return model(tokens, **options), model.hidden_states(tokens, **options)


def run(model, tokens=TOKENS, segments=None, key=None):
    """Return the logits and the hidden states of the model, computed under `jax.jit`."""
    return _run(*nnx.split(model), jnp.asarray(tokens), None if segments is None else jnp.asarray(segments), key)


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef, state, tokens, cache, segments):
    model = nnx.merge(graphdef, state)
    x, cache = model.decode(tokens, cache, segments=segments)
    return model.logits(x), cache


def decode(model, tokens, cache, segments=None):
    """Return the logits of new tokens and the longer cache, computed under `jax.jit`."""
    return _decode(*nnx.split(model), jnp.asarray(tokens), cache, None if segments is None else jnp.asarray(segments))


def norm(x, scale, c):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.epsilon) * (scale + c.unit_offset)


def turned(x, position, c, local):
    """Return the features of one head after the rotary position embedding of one position, by complex numbers."""
    half = c.head_width // 2
    own = local and c.local_rope_theta
    out = np.zeros(c.head_width)
    for i in range(half):
        angle = (c.local_rope_theta if own else c.rope_theta) ** (-i / half)
        if not own and c.rope_type == "linear":
            angle /= c.rope_factor
        if not own and c.rope_type == "llama3":
            turns = angle * c.rope_positions / (2 * np.pi)
            share = min(max((turns - c.rope_low) / (c.rope_high - c.rope_low), 0), 1)
            angle = share * angle + (1 - share) * angle / c.rope_factor
        pair = (x[i] + 1j * x[i + half]) * np.exp(1j * angle * position)
        out[i], out[i + half] = pair.real, pair.imag
    return out


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def oracle_attention(c, p, block, x, segments, local):
    positions = [sum(segments[:t] == segments[t]) for t in range(len(x))]
    project = lambda name, h: x @ p[f"{name}/kernel"][:, h] + p.get(f"{name}/bias", np.zeros((9, 1)))[h]  # noqa: E731
    out = np.zeros_like(x) + p.get(f"{block}/out/bias", 0)
    for head in range(c.heads):
        other = head // (c.heads // c.kv_heads)
        q, k, v = (project(f"{block}/{n}", h) for n, h in (("query", head), ("key", other), ("value", other)))
        if c.qk_norm:
            q, k = norm(q, p[f"{block}/query_norm/scale"], c), norm(k, p[f"{block}/key_norm/scale"], c)
        q, k = (np.stack([turned(row, at, c, local) for row, at in zip(a, positions, strict=True)]) for a in (q, k))
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            seen = [s for s in seen if not local or positions[t] - positions[s] < c.window]
            scores = k[seen] @ q[t] / np.sqrt(c.score_width or c.head_width)
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            weights = np.exp(scores - scores.max())
            out[t] += weights / weights.sum() @ v[seen] @ p[f"{block}/out/kernel"][head]
    return out


def oracle(model, tokens, segments):
    """Return the logits and hidden states of one sequence, computed by NumPy in float64, in loops."""
    c = model.config
    p = {path: value.astype(np.float64) for path, value in parameters(model).items()}
    x = p["embed/embedding"][tokens] * (np.sqrt(c.width) if c.scaled_embed else 1)
    hidden = [x]
    bias = lambda path: p.get(f"{path}/bias", 0)  # noqa: E731
    for i in range(c.depth):
        block, local = f"blocks/{i}", c.layer_pattern[i % len(c.layer_pattern)] == "L"
        y = oracle_attention(c, p, f"{block}/attention", norm(x, p[f"{block}/norm1/scale"], c), segments, local)
        x = x + (norm(y, p[f"{block}/post_norm1/scale"], c) if c.post_norms else y)
        y = norm(x, p[f"{block}/norm2/scale"], c)
        gate, up = (y @ p[f"{block}/mlp/{n}/kernel"] + bias(f"{block}/mlp/{n}") for n in ("gate", "up"))
        y = (ACTIVATIONS[c.activation](gate) * up) @ p[f"{block}/mlp/down/kernel"] + bias(f"{block}/mlp/down")
        x = x + (norm(y, p[f"{block}/post_norm2/scale"], c) if c.post_norms else y)
        hidden.append(x)
    hidden[-1] = norm(x, p["norm/scale"], c)
    logits = hidden[-1] @ (p["embed/embedding"].T if c.tied_head else p["head/kernel"])
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits, hidden


class TestForward:
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_the_published_architecture(self, name):
        model = tiny(name)
        logits, hidden = run(model, segments=SEGMENTS)
        assert (logits.shape, len(hidden)) == ((3, 9, 23), 4)
        for row in range(3):
            kept = SEGMENTS[row] > 0
            expected, states = oracle(model, TOKENS[row], SEGMENTS[row])
            assert relative_error(logits[row][kept], expected[kept]) < 1e-5
            for got, wanted in zip(hidden, states, strict=True):
                assert relative_error(got[row][kept], wanted[kept]) < 1e-5

    @pytest.mark.parametrize("name", fast(MODELS, "gemma"))
    def test_packed_and_padded_texts_equal_single_ones(self, name):
        model = tiny(name)
        logits, _ = run(model, segments=SEGMENTS)
        for row, text in ((0, 1), (0, 2), (1, 3), (2, 1)):
            kept = SEGMENTS[row] == text
            single, _ = run(model, TOKENS[row : row + 1, kept])
            assert relative_error(logits[row][kept], single[0]) < 1e-5
        mask = jnp.asarray(SEGMENTS[1:] > 0)
        for other in (mask, mask.astype(jnp.int32)):
            assert relative_error(run(model, TOKENS[1:], other)[0][mask], logits[1:][mask]) < 1e-6

    @pytest.mark.parametrize(
        ("tokens", "segments", "message"),
        [
            (jnp.zeros((2, 33), jnp.int32), None, "at most 32 tokens, got sequences of 33"),
            (jnp.zeros(9, jnp.int32), None, r"integers \(batch, tokens\), got int32 \(9,\)"),
            (jnp.zeros((2, 9)), None, r"got float32 \(2, 9\)"),
            (jnp.zeros((2, 9), jnp.int32), jnp.ones((9, 9), bool), r"segments .* \(2, 9\), got bool \(9, 9\)"),
            (jnp.zeros((2, 9), jnp.int32), jnp.zeros((2, 9)), "segments must be integers or booleans"),
        ],
    )
    def test_wrong_inputs(self, tokens, segments, message):
        with pytest.raises(UserError, match=message):
            tiny().features(tokens, segments=segments)

    def test_a_token_outside_the_vocabulary_is_not_a_number(self):
        assert np.isnan(run(tiny(), np.full((1, 2), 23))[0]).all()

    @pytest.mark.parametrize("name", fast(["qwen", "gemma"]))
    def test_bfloat16_is_near_float32(self, name):
        exact, _ = run(tiny(name), segments=SEGMENTS)
        model = tiny(name, dtype="bfloat16", param_dtype="bfloat16")
        assert {value.dtype for value in parameters(model).values()} == {jnp.dtype("bfloat16")}
        logits, hidden = run(model, segments=SEGMENTS)
        assert logits.dtype == jnp.float32
        assert {state.dtype for state in hidden} == {jnp.dtype("bfloat16")}
        # The error must have the size of rounding errors in bfloat16, which has 8 bits.
        assert 1e-3 < relative_error(logits, exact) < 0.1

    @pytest.mark.parametrize(("name", "dtype"), fast([("gemma", "float32"), ("qwen", "bfloat16")], unpack=True))
    def test_gradients_reach_every_parameter_and_are_finite_even_of_padding_alone(self, name, dtype):
        graphdef, state = nnx.split(tiny(name, dtype=dtype))
        segments = jnp.asarray(SEGMENTS).at[0].set(0)

        def total(state):
            return jnp.square(nnx.merge(graphdef, state)(jnp.asarray(TOKENS), segments=segments)).sum()

        for path, variable in nnx.to_flat_state(jax.jit(jax.grad(total))(state)):
            gradient = np.asarray(variable[...])
            assert np.isfinite(gradient).all(), path
            assert gradient.any(), path

    def test_the_key_decides_on_dropout(self):
        model = tiny(dropout=0.5)
        first, again, other = (run(model, key=jax.random.key(seed))[0] for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert relative_error(first, other) > 1e-3
        assert relative_error(run(model)[0], run(tiny())[0]) == 0


class TestCache:
    @pytest.mark.parametrize("name", fast(MODELS, "gemma"))
    def test_decoding_equals_a_call_for_all_tokens(self, name):
        model = tiny(name)
        expected, _ = run(model)
        logits, cache = decode(model, TOKENS[:, :4], Cache.empty(model.config, 3, 11))
        parts = [logits]
        for index in range(4, 9):
            logits, cache = decode(model, TOKENS[:, index : index + 1], cache)
            parts.append(logits)
        assert relative_error(jnp.concatenate(parts, 1), expected) < 1e-5
        assert int(cache.length) == 9

    @pytest.mark.parametrize("name", fast(["gemma", "qwen"]))
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_prompts_of_different_lengths_equal_single_ones(self, name, side):
        model = tiny(name)
        lengths = np.array([5, 3, 1])
        place = np.arange(5)[None]
        mask = place < lengths[:, None] if side == "right" else place >= 5 - lengths[:, None]
        _, cache = decode(model, TOKENS[:, :5], Cache.empty(model.config, 3, 9), mask)
        parts = []
        for index in range(5, 9):
            logits, cache = decode(model, TOKENS[:, index : index + 1], cache)
            parts.append(logits)
        for row in range(3):
            text = np.concatenate([TOKENS[row, :5][mask[row]], TOKENS[row, 5:]])[None]
            expected, _ = run(model, text)
            got = jnp.concatenate(parts, 1)[row]
            assert relative_error(got, expected[0, -4:]) < 1e-5

    def test_too_many_tokens_are_not_numbers(self):
        model = tiny()
        logits, cache = decode(model, TOKENS[:, :4], Cache.empty(model.config, 3, 5))
        assert np.isfinite(logits).all()
        assert np.isnan(decode(model, TOKENS[:, 4:6], cache)[0]).all()
        with pytest.raises(UserError, match="at most 32 tokens, got a cache for 33"):
            Cache.empty(model.config, 1, 33)

    @pytest.mark.exhaustive
    def test_a_donated_cache_is_changed_in_place(self):
        model = tiny(max_positions=4096)
        graphdef, state = nnx.split(model)

        def step(state, tokens, cache):
            return nnx.merge(graphdef, state).decode(tokens, cache)

        cache = jax.eval_shape(lambda: Cache.empty(model.config, 2, 4096))
        lowered = jax.jit(step, donate_argnames="cache").lower(state, jax.ShapeDtypeStruct((2, 1), jnp.int32), cache)
        memory = lowered.compile(compiler_options={"xla_backend_optimization_level": 2}).memory_analysis()
        size = cache.keys.size * 4
        assert memory.alias_size_in_bytes > 2 * size
        assert memory.temp_size_in_bytes < size  # The keys and values of one of three blocks are 2 / 3 of `size`.

    def test_scanned_blocks_share_the_cache(self):
        model = tiny("gemma")
        assert runs_of(model.blocks, lambda path: None) == [3]
        expected, _ = decode(model, TOKENS[:, :4], Cache.empty(model.config, 3, 6))
        scanned = nnx.merge(*nnx.split(model))
        blocks = nnx.merge(*jax.tree.map(jnp.copy, nnx.split(model.blocks)))
        scanned.blocks = as_parts(blocks, [3])
        got, _ = decode(scanned, TOKENS[:, :4], Cache.empty(model.config, 3, 6))
        assert relative_error(got, expected) < 1e-6
        for ours, theirs in zip(run(scanned)[1], run(model)[1], strict=True):
            assert relative_error(ours, theirs) < 1e-6


class TestAdaptersAndRemat:
    @pytest.mark.parametrize(
        ("name", "per_block"), [("qkv", 3), ("qv", 2), ("attention", 4), ("mlp", 3), ("all-linear", 7)]
    )
    def test_targets_select_linear_layers_of_every_block(self, name, per_block):
        model, _ = adapt(tiny(), [Rule(name, LoRA())], rngs=nnx.Rngs(1))
        adapted = [path for path, *_ in iter_parts(model)]
        assert len(adapted) == 3 * per_block
        assert all(re.fullmatch(Decoder.adapter_targets[name], path) for path in adapted)

    def test_an_update_counts_in_a_call_and_in_the_cache_and_merges(self):
        base = tiny("qwen")
        rules = [Rule("all-linear", CirculantUpdate()), Rule("head", LoRA())]
        model, adapter = adapt(base, rules, rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        changed, _ = run(model)
        assert relative_error(changed, run(base)[0]) > 1e-2
        assert relative_error(run(merge(model)[0])[0], changed) < 1e-5
        assert relative_error(decode(model, TOKENS, Cache.empty(model.config, 3, 9))[0], changed) < 1e-5

    def test_an_update_of_the_embeddings_reaches_the_tied_head(self):
        model, adapter = adapt(tiny(), [Rule("embed", LoRA())], rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        changed, _ = run(model)
        assert relative_error(changed, run(tiny())[0]) > 1e-2
        assert relative_error(run(merge(model)[0])[0], changed) < 1e-5

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("method", ["bottleneck", "circulant_adapter"])
    def test_branches_after_attention_and_mlp(self, method):
        from surm_jax.peft import make_method

        model, adapter = adapt(tiny(), [Rule("houlsby", make_method(method, {}))], rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
        expected, _ = run(model)
        assert relative_error(expected, run(tiny())[0]) > 1e-2
        assert relative_error(decode(model, TOKENS, Cache.empty(model.config, 3, 9))[0], expected) < 1e-5

    @pytest.mark.parametrize("remat", fast(["block", "none", "dots"]))
    def test_scanned_and_rematerialised_blocks_have_the_same_values_and_gradients(self, remat):
        def value_and_gradients(remat, scan):
            model, adapter = adapt(tiny("gemma", remat=remat, dropout=0.3), [Rule("qv", LoRA())], rngs=nnx.Rngs(0))
            model = nnx.merge(*jax.tree.map(jnp.copy, nnx.split(perturb(model, adapter))))
            parts, trained, frozen = partition(model, adapter, scan_layers=scan)

            def total(trained):
                model, key = parts.merge(trained, frozen), jax.random.key(3)
                return jnp.square(model(jnp.asarray(TOKENS), segments=jnp.asarray(SEGMENTS), rngs=key)).sum()

            value, gradients = jax.jit(jax.value_and_grad(total))(trained)
            return value, parts.by_block(gradients)

        (value, plain), (again, scanned) = value_and_gradients("none", False), value_and_gradients(remat, True)
        np.testing.assert_allclose(again, value, rtol=1e-6)
        assert len(plain) == 12
        for path, gradient in plain.items():
            assert relative_error(scanned[path], gradient) < 1e-5, path


class TestConfig:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"kv_heads": 3}, "kv_heads must divide heads, got 3 for 4 heads"),
            ({"head_width": 5}, "head_width must be even for rotary positions, got 5"),
            ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
            ({"rope_type": "yarn"}, r"rope_type must be one of \('default', 'linear', 'llama3'\), got 'yarn'"),
            ({"rope_theta": 0.0}, "rope_theta must be a number, positive and finite, got 0.0"),
            ({"logit_softcap": -1.0}, "logit_softcap must be a number, at least 0 and finite, got -1.0"),
            ({"rope_low": 4.0}, "rope_low must be below rope_high"),
            ({"layer_pattern": "GX"}, "layer_pattern must consist of G and L, got 'GX'"),
            ({"layer_pattern": "L"}, "window must be a positive integer if there are local blocks.* got 0"),
            ({"window": 3}, "and 0 if there are none, got 3"),
            ({"activation": "swish"}, "activation must be one of"),
            ({"end_tokens": (1, "2")}, "tokens that begin, end and pad a text are integers, got '2'"),
            ({"family": "gemma3"}, "did you mean 'gemma"),
        ],
    )
    def test_mistakes(self, overrides, message):
        with pytest.raises(UserError, match=message):
            DecoderConfig(**{**TINY, **overrides})

    def test_a_list_of_end_tokens_as_json_has_it(self):
        assert DecoderConfig(**TINY, end_tokens=[1, 2]) == DecoderConfig(**TINY, end_tokens=(1, 2))

    def test_frequencies_of_local_blocks_are_not_scaled(self):
        config = DecoderConfig(**TINY, **{n: MODELS["gemma"][n] for n in ("rope_type", "rope_factor")})
        own = dataclasses.replace(config, local_rope_theta=5.0)
        assert rope_frequencies(config, "L").tolist() == rope_frequencies(config, "G").tolist()
        np.testing.assert_allclose(rope_frequencies(own, "L"), 5.0 ** -(np.arange(5) / 5), rtol=1e-6)


def test_initialisation():
    config = DecoderConfig(**{**TINY, "width": 96, "mlp_width": 200, "vocab_size": 200, "head_width": 40})
    for path, value in parameters(jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()).items():
        if path.endswith("scale"):
            assert (value == 1).all(), path
        else:
            np.testing.assert_allclose(value.std(), 0.02, rtol=0.1, err_msg=path)
