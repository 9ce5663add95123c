"""Comparison of `Decoder` with the decoders of Hugging Face transformers, with random and with trained weights.

In this file, "ours" and "theirs" are the results or models of this package and of transformers. The tests are skipped
if the libraries in `requirements-peers.txt` are not installed.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.models import Cache
from surm_jax.peft import CirculantUpdate, LoRA, Rule, adapt, merge
from surm_jax.pretrained import from_pretrained, save_huggingface
from surm_jax.pretrained.hf import ARCHITECTURES, architecture_of
from tests.peft.models import perturb, relative_error
from tests.pretrained.hf.hf_trees import read_tree, written_tree
from tests.speeds import fast

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

# All axes of a stored array have different sizes, so that a test fails if two axes are exchanged.
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": False,
}
THETA = {"rope_theta": 100.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 50.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, **THETA}
GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 7, "tie_word_embeddings": True}
# The `model_type` of each case, and fields of its configuration beside `SIZES`.
CASES = {
    "llama": ("llama", {"rope_parameters": THETA, "tie_word_embeddings": True}),
    "llama 3 with biases": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "linear": ("llama", {"rope_parameters": LINEAR, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
}
PADDINGS = {"none": [9, 9], "right": [9, 5], "left": [9, -5]}


@functools.cache
def theirs(name):
    """Return the model of transformers for a case, with random weights that are not small."""
    model_type, fields = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **fields}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_scale = key.endswith("norm.weight") and not model_type.startswith("gemma")
            parameter.copy_(is_scale + 0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def config_of(name, model, **overrides):
    fields = json.loads(model.config.to_json_string(use_diff=False))
    return ARCHITECTURES[CASES[name][0]].read_config(fields, overrides)


@functools.cache
def ours(name):
    model = theirs(name)
    arrays = {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del arrays["lm_head.weight"]
    return read_tree(ARCHITECTURES[CASES[name][0]], config_of(name, model), arrays)


def batch(padding):
    """Return tokens and a mask of padding. A negative length stands for a sequence that is padded at the left."""
    rng, place = np.random.default_rng(1), np.arange(9)
    mask = np.stack([place < length if length > 0 else place >= 9 + length for length in PADDINGS[padding]])
    return np.where(mask, rng.integers(4, 23, mask.shape), 0), mask


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, tokens, mask):
    model = nnx.merge(graphdef, state)
    return model(tokens, segments=mask), model.hidden_states(tokens, segments=mask)


@pytest.mark.parametrize(
    ("name", "padding"),
    fast(
        ((name, padding) for name in CASES for padding in PADDINGS), ("llama", "left"), ("gemma3", "right"), unpack=True
    ),
)
def test_hidden_states_logits_and_gradients(name, padding):
    model, peer = ours(name), theirs(name)
    tokens, mask = batch(padding)
    expected = peer(torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True)
    dy = (np.random.default_rng(2).normal(size=expected.logits.shape) * mask[..., None]).astype(np.float32)
    peer.zero_grad()
    expected.logits.backward(torch.tensor(dy))
    graphdef, state = nnx.split(model)

    def product(state):
        logits, hidden = run(graphdef, state, tokens, mask)
        return (logits * dy).sum(), (logits, hidden)

    gradients, (logits, hidden) = jax.jit(jax.grad(product, has_aux=True))(state)
    assert relative_error(logits[mask], expected.logits.detach()[mask]) < 1e-5
    for index, (got, wanted) in enumerate(zip(hidden, expected.hidden_states, strict=True)):
        assert relative_error(got[mask], wanted.detach()[mask]) < 1e-5, index
    got = written_tree(architecture_of(model.config), nnx.merge(graphdef, gradients))
    wanted = {key: parameter.grad.numpy() for key, parameter in peer.named_parameters()}
    assert got.keys() == wanted.keys()
    for key in got:
        assert np.abs(got[key] - wanted[key]).max() <= 1e-4 * np.abs(wanted[key]).max(), key


@pytest.mark.parametrize("name", fast(CASES))
def test_configurations_there_and_back(name):
    """Check that transformers reads the `config.json` that we write, and that we read what it writes."""
    config = config_of(name, theirs(name))
    written = architecture_of(config).write_config(config)
    again = transformers.AutoConfig.for_model(**written)
    assert config_of(name, type("Read", (), {"config": again})) == config
    for field in ("rope_parameters", "sliding_window", "layer_types", "query_pre_attn_scalar", "eos_token_id"):
        assert getattr(again, field, None) == getattr(theirs(name).config, field, None), field


@pytest.fixture(scope="module")
def stories(shared):
    folder = shared / "data/weights/stories260k"
    return from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), folder


def test_a_trained_llama(stories):
    model, peer, folder = stories
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    prompt = np.array([tokenizer("Once upon a time, there was a")["input_ids"]])
    expected = peer(torch.tensor(prompt), output_hidden_states=True)
    logits, hidden = run(*nnx.split(model), prompt, np.ones(prompt.shape, bool))
    assert relative_error(logits, expected.logits.detach()) < 1e-5
    for got, wanted in zip(hidden, expected.hidden_states, strict=True):
        assert relative_error(got, wanted.detach()) < 1e-5

    @jax.jit
    def step(state, tokens, cache):
        model = nnx.merge(graphdef, state)
        x, cache = model.decode(tokens, cache)
        return jnp.argmax(model.logits(x[:, -1]), -1)[:, None], cache

    graphdef, state = nnx.split(model)
    cache = Cache.empty(model.config, 1, 64)
    token, cache = step(state, jnp.asarray(prompt), cache)
    told = [int(token[0, 0])]
    for _ in range(36):
        token, cache = step(state, token, cache)
        told.append(int(token[0, 0]))
    text = tokenizer.decode([*prompt[0], *told])
    continued = " little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    assert continued in text
    generated = peer.generate(torch.tensor(prompt), max_new_tokens=37, do_sample=False)[0, prompt.shape[1] :]
    assert told == generated.tolist()


@pytest.mark.parametrize("dtype", fast(["float32", "bfloat16"]))
def test_a_merged_llama_loads_in_transformers(stories, dtype, tmp_path):
    """Check that the merged model and that of transformers equal the adapted model, up to the rounding of kernels."""
    base = from_pretrained(stories[2], param_dtype=dtype)
    adapted, adapter = adapt(base, [Rule("attention", LoRA(rank=2)), Rule("mlp", CirculantUpdate())], rngs=nnx.Rngs(0))
    adapted = perturb(adapted, adapter, size=0.02)
    merged, _ = merge(adapted)
    save_huggingface(tmp_path / "merged", merged)
    tokens = np.array([[1, 403, 407, 261]])
    ours, _ = run(*nnx.split(adapted), tokens, np.ones(tokens.shape, bool))
    plain, _ = run(*nnx.split(merged), tokens, np.ones(tokens.shape, bool))
    assert relative_error(ours, run(*nnx.split(base), tokens, np.ones(tokens.shape, bool))[0]) > 0.05
    assert relative_error(plain, ours) < (1e-5 if dtype == "float32" else 0.02)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert str(peer.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        assert relative_error(plain, peer.float()(torch.tensor(tokens)).logits) < 1e-5
