"""Check that transformers reads the folders that we write, that we read its folders, and that logits agree.

The tests are skipped if the libraries in `requirements-peers.txt` are not installed.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.models import BertConfig, DecoderConfig, ViTConfig, model_class
from surm_jax.pretrained import from_pretrained, save_huggingface
from tests.speeds import fast

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

# All axes of a stored array have different sizes, except the two sides of a patch, so that a test fails if two axes are
# exchanged. The epsilon is large enough to have a noticeable effect.
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "channels": 2,
    "width": 12,
    "depth": 2,
    "heads": 3,
    "mlp_width": 24,
    "num_classes": 5,
    "activation": "gelu",
    "epsilon": 1e-3,
}
CLIP = {"pool": "patches", "final_norm": False, "patch_bias": False, "pre_norm": True, "activation": "quick_gelu"}
TEXT = {
    "vocab_size": 23,
    "width": 12,
    "depth": 2,
    "heads": 3,
    "mlp_width": 20,
    "max_positions": 14,
    "type_vocab_size": 2,
    "num_classes": 5,
}
ROBERTA = {"positions": "after_padding", "pad_token": 1, "type_vocab_size": 1, "epsilon": 1e-5}
DECODER = {
    "vocab_size": 23,
    "width": 12,
    "depth": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 10,
    "mlp_width": 20,
    "max_positions": 32,
    "epsilon": 1e-3,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "rope_factor": 4.0, "rope_positions": 16, "mlp_bias": True}
GEMMA = {"post_norms": True, "unit_offset": True, "scaled_embed": True, "score_width": 7, "window": 4}
GEMMA |= {"activation": "gelu_tanh", "tied_head": True}
CASES = {
    "ViTForImageClassification": ViTConfig(**IMAGE),
    "IJepaForImageClassification": ViTConfig(**IMAGE, pool="mean"),
    "DeiTForImageClassification": ViTConfig(**IMAGE, distillation=True),
    "Dinov2ForImageClassification": ViTConfig(**IMAGE, pool="token+patches", layer_scale=True),
    "CLIPForImageClassification": ViTConfig(**{**IMAGE, **CLIP}),
    "CLIPVisionModelWithProjection": ViTConfig(
        **{**IMAGE, **CLIP, "pool": "token", "final_norm": True, "head_bias": False}
    ),
    "BertForSequenceClassification": BertConfig(**TEXT),
    "BertForMaskedLM": BertConfig(**TEXT, head="mlm"),
    "RobertaForSequenceClassification": BertConfig(**{**TEXT, **ROBERTA}),
    "RobertaForMaskedLM": BertConfig(**{**TEXT, **ROBERTA}, head="mlm"),
    "LlamaForCausalLM": DecoderConfig(**DECODER, **LLAMA3, end_tokens=(1, 2)),
    "MistralForCausalLM": DecoderConfig(**DECODER, family="mistral", layer_pattern="L", window=4, begin_token=1),
    "Qwen2ForCausalLM": DecoderConfig(**DECODER, family="qwen2", qkv_bias=True, tied_head=True),
    "Qwen3ForCausalLM": DecoderConfig(**DECODER, family="qwen3", qk_norm=True, layer_pattern="GL", window=3),
    "Gemma2ForCausalLM": DecoderConfig(
        **DECODER, **GEMMA, family="gemma2", layer_pattern="LG", attention_softcap=2.0, logit_softcap=3.0
    ),
    "Gemma3ForCausalLM": DecoderConfig(
        **DECODER,
        **GEMMA,
        family="gemma3_text",
        layer_pattern="LG",
        qk_norm=True,
        local_rope_theta=10.0,
        rope_type="linear",
        rope_factor=2.0,
    ),
}


def random_model(config):
    """Return a model whose parameters, including those of the head, are random numbers that are not small."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    values = [
        (path, v.copy(jnp.asarray((path[-1] == "scale") + 0.3 * rng.standard_normal(v.shape), v.dtype)))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def inputs_of(config):
    rng = np.random.default_rng(1)
    if isinstance(config, ViTConfig):
        return rng.standard_normal((3, 8, 8, 2)).astype(np.float32)
    return rng.integers(2, config.vocab_size, (3, 9))  # Tokens from 2 on are not padding.


def our_logits(model, inputs):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(inputs))(state, jnp.asarray(inputs)))


def their_logits(model, inputs):
    with torch.no_grad():
        if inputs.ndim == 4:
            result = model.eval()(pixel_values=torch.tensor(inputs.transpose(0, 3, 1, 2)))
        else:
            result = model.eval()(torch.tensor(inputs), attention_mask=torch.ones(inputs.shape))
    return (result.image_embeds if hasattr(result, "image_embeds") else result.logits).numpy()


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", fast(CASES, "ViTForImageClassification", "LlamaForCausalLM"))
def test_there_and_back(name, tmp_path):
    config = CASES[name]
    model = random_model(config)
    labels = None if "LM" in name or "Projection" in name else ["ant", "bee", "cat", "dog", "elk"]
    save_huggingface(tmp_path / "ours", model, labels=labels)
    peer, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    if labels:
        assert [peer.config.id2label[index] for index in range(5)] == labels
        assert [peer.config.label2id[label] for label in labels] == [*range(5)]
    inputs = inputs_of(config)
    logits = our_logits(model, inputs)
    assert_close(logits, their_logits(peer, inputs))

    # Read the model again, from shards that transformers has written.
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = from_pretrained(tmp_path / "theirs")
    assert again.config == config
    for (path, ours), (_, same) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(ours[...], same[...], err_msg=str(path))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["ViTForImageClassification", "Gemma3ForCausalLM"])
def test_half_precision_on_their_side(name, tmp_path):
    config = CASES[name]
    save_huggingface(tmp_path / "ours", random_model(config))
    for dtype in (torch.float16, torch.bfloat16):
        peer = getattr(transformers, name).from_pretrained(tmp_path / "ours", dtype=dtype)
        peer.save_pretrained(tmp_path / "half")
        ours = from_pretrained(tmp_path / "half")
        again = getattr(transformers, name).from_pretrained(tmp_path / "half", dtype=torch.float32)
        assert_close(our_logits(ours, inputs_of(config)), their_logits(again, inputs_of(config)))


@pytest.mark.exhaustive
def test_a_bfloat16_model_is_theirs_to_the_bit(tmp_path):
    config = ViTConfig(**IMAGE, param_dtype="bfloat16")
    model = random_model(config)
    save_huggingface(tmp_path / "ours", model)
    peer = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(model.norm.scale[...], peer.vit.layernorm.weight.detach().numpy())
    assert_close(our_logits(model, inputs_of(config)), their_logits(peer, inputs_of(config)))


@pytest.mark.exhaustive
def test_pickles_and_their_way_out(tmp_path):
    config = CASES["ViTForImageClassification"]
    save_huggingface(tmp_path / "ours", random_model(config))
    peer = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").unlink()
    torch.save(peer.state_dict(), tmp_path / "ours" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"from_pretrained\(folder\)\.save_pretrained\(folder\)"):
        from_pretrained(tmp_path / "ours")
    transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "ours")
    assert from_pretrained(tmp_path / "ours").config == config


@pytest.mark.exhaustive
def test_the_body_of_a_clip_model_under_another_head(tmp_path):
    """Check that a CLIP model can be read with the head of CLIPForImageClassification, whose body is the same."""
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
        )
    )
    theirs.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, num_classes=5, pool="patches", final_norm=False, head_bias=True)
    stored = from_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    for ours, other in zip(model.hidden_states(images), stored.hidden_states(images), strict=True):
        np.testing.assert_array_equal(ours, other)
    assert model(images).shape == (2, 5) and model.norm is None
