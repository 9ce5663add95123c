"""Test reading and writing folders of decoders, without transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from surm_jax.errors import UserError
from surm_jax.models import Decoder, DecoderConfig
from surm_jax.pretrained import from_pretrained, save_huggingface
from surm_jax.pretrained.hf import ARCHITECTURES, architecture_of
from tests.models.test_decoder import TINY
from tests.peft.models import materialize, parameters
from tests.speeds import fast

FIELDS = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def read(model_type="llama", overrides=None, **fields):
    return ARCHITECTURES[model_type].read_config({**FIELDS, **fields}, overrides or {})


class TestReadConfig:
    def test_defaults_are_those_of_transformers(self):
        config = ARCHITECTURES["llama"].read_config({}, {})
        assert config == DecoderConfig(
            vocab_size=32_000, width=4096, depth=32, heads=32, kv_heads=32, head_width=128, mlp_width=11_008,
            max_positions=2048, begin_token=1, end_tokens=(2,),
        )  # fmt: skip
        assert ARCHITECTURES["mistral"].read_config({}, {}).window == 4096

    def test_the_published_gemma3(self):
        """Read the fields of google/gemma-3-1b-it as transformers 4 wrote them."""
        config = ARCHITECTURES["gemma3_text"].read_config(
            {
                "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
                "max_position_embeddings": 32_768, "num_attention_heads": 4, "num_hidden_layers": 26,
                "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
                "rope_local_base_freq": 10_000, "rope_scaling": None, "rope_theta": 1_000_000,
                "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262_144, "torch_dtype": "bfloat16",
            },
            {},
        )  # fmt: skip
        assert (config.layer_pattern, config.window, config.kinds.count("G")) == ("LLLLLG", 512, 4)
        assert (config.rope_theta, config.local_rope_theta) == (1_000_000, 10_000)
        assert config.tied_head and config.qk_norm and config.post_norms and config.unit_offset
        assert config.end_tokens == (1, 106)

    @pytest.mark.parametrize("key", ["rope_type", "type"])
    def test_old_and_new_names_of_rotary_positions(self, key):
        old = read(rope_theta=50.0, rope_scaling={key: "llama3", **LLAMA3})
        new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 50.0, **LLAMA3})
        assert old == new
        assert (new.rope_type, new.rope_theta, new.rope_factor, new.rope_positions) == ("llama3", 50.0, 8.0, 16)
        assert read(rope_scaling=None) == read(rope_parameters={"rope_type": "default"}) == read()

    @pytest.mark.parametrize(
        ("model_type", "fields", "pattern"),
        [
            ("qwen2", {"use_sliding_window": False}, "G"),
            ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "GGL"),
            ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, "L"),
            ("mistral", {"sliding_window": None}, "G"),
            ("mistral", {}, "L"),
            ("gemma2", {}, "LG"),
            ("gemma3_text", {"sliding_window_pattern": 3}, "LLG"),
            ("llama", {"layer_types": ["full_attention"] * 3}, "G"),
        ],
    )
    def test_patterns_of_layers(self, model_type, fields, pattern):
        config = read(model_type, **fields)
        assert config.layer_pattern == pattern
        assert config.window == (4096 if "L" in pattern else 0)
        again = ARCHITECTURES[model_type].read_config(ARCHITECTURES[model_type].write_config(config), {})
        assert again == config

    @pytest.mark.parametrize(
        ("model_type", "fields", "message"),
        [
            ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = 'yarn', but there are 'def"),
            ("llama", {"rope_parameters": {"rope_type": "linear"}}, "positions of type 'linear' need 'factor'"),
            ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, "rope_scaling.mscale = 1, but"),
            ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5, but our pos"),
            ("llama", {"sliding_window": 4}, "sliding_window = 4, but our llama has no such part"),
            (
                "llama",
                {"layer_types": ["sliding_attention"] * 3},
                "layer_types = .* but our llama has 3 layers of full",
            ),
            ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}, but our llama has no"),
            ("mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0, but our mistral has no"),
            ("mistral", {"attention_bias": True}, "attention_bias = True, but our mistral has no such part"),
            ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window = None, but there are layers of"),
            ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True, but our gemma2"),
            ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, but our gemma3_text"),
            ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "must have the entries full_attention and"),
            ("gemma3_text", {"layer_types": ["full_attention"]}, "gemma3_text has 3 layers of full_attention or slid"),
            ("llama", {"num_key_value_heads": 3}, "kv_heads must divide heads, got 3 for 4 heads"),
            ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000, but a model has 1 to 1000"),
            ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish', but there are"),
        ],
    )
    def test_what_our_model_cannot_express_is_refused(self, model_type, fields, message):
        with pytest.raises(UserError, match=message):
            read(model_type, **fields)

    def test_classes_are_refused(self):
        with pytest.raises(UserError, match="a llama continues text and has no classes: choose a BERT or RoBERTa"):
            read(overrides={"num_classes": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": True}, "transformers' llama has qk_norm=False, but the model has True"),
        ({"family": "qwen2"}, "transformers' qwen2 has qkv_bias=True, but the model has False"),
        (
            {"family": "mistral", "logit_softcap": 3.0},
            "transformers' mistral has logit_softcap=0, but the model has 3.0",
        ),
    ],
)
def test_models_that_transformers_does_not_have(fields, message):
    config = DecoderConfig(**TINY, **fields)
    with pytest.raises(UserError, match=message):
        architecture_of(config).write_config(config)


def save(folder, **fields):
    """Write a folder with a small random Llama, and return the model and the arrays in the folder."""
    model = materialize(lambda: Decoder(DecoderConfig(**TINY, **fields), rngs=nnx.Rngs(0)))
    save_huggingface(folder, model)
    return model, load_file(folder / "model.safetensors")


def shard(folder, tensors):
    """Divide the weights of a folder into three files (shards) with an index."""
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"model-{index % 3}.safetensors" for index, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class TestFolders:
    @pytest.mark.parametrize("tied", [True, False])
    def test_shards_there_and_back(self, tied, tmp_path):
        model, tensors = save(tmp_path, tied_head=tied)
        assert ("lm_head.weight" in tensors) is not tied
        shard(tmp_path, tensors)
        again = from_pretrained(tmp_path)
        assert again.config == model.config
        for path, value in parameters(model).items():
            np.testing.assert_array_equal(parameters(again)[path], value, err_msg=path)
        (tmp_path / "model-1.safetensors").unlink()
        with pytest.raises(UserError, match=r"lists the shard 'model-1.safetensors', which is not in .*: fetch it too"):
            from_pretrained(tmp_path)

    @pytest.mark.parametrize("dtype", fast(["float16", "bfloat16"], "bfloat16"))
    def test_half_precision(self, dtype, tmp_path):
        _, tensors = save(tmp_path)
        halves = {key: value.astype(jnp.dtype(dtype)) for key, value in tensors.items()}
        save_file(halves, tmp_path / "model.safetensors")
        model = from_pretrained(tmp_path)
        assert {value.dtype for value in parameters(model).values()} == {np.dtype("float32")}
        np.testing.assert_array_equal(model.head.kernel[...].T, halves["lm_head.weight"].astype(np.float32))
        small = from_pretrained(tmp_path, param_dtype="bfloat16")
        save_huggingface(tmp_path / "again", small)
        assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
        assert {value.dtype for value in load_file(tmp_path / "again" / "model.safetensors").values()} == {
            jnp.dtype("bfloat16")
        }

    def test_copies_and_frequencies_of_other_versions(self, tmp_path):
        model, tensors = save(tmp_path, tied_head=True)
        head = tensors["model.embed_tokens.weight"]
        frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
        save_file({**tensors, **frequencies, "lm_head.weight": head}, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(from_pretrained(tmp_path).norm.scale[...], model.norm.scale[...])
        save_file({**tensors, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
        with pytest.raises(
            UserError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight', but the model"
        ):
            from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"vocab_size": 24},
                r"'model.embed_tokens.weight' has shape \(23, 12\), but 'embed/embedding' is \(24, 12\)",
            ),
            ({"num_key_value_heads": 4}, r"'blocks/0/attention/key/kernel': it has shape \(20, 12\), not \(40, 12\)"),
            ({"tie_word_embeddings": False}, "no key fills 'head/kernel'"),
            ({"attention_bias": True}, "no key fills 'blocks/0/attention/.*/bias'"),
            ({"num_hidden_layers": 2}, "'blocks/2/.*', which the model does not have"),
        ],
    )
    def test_weights_that_do_not_fit_the_configuration(self, fields, message, tmp_path):
        save(tmp_path, tied_head=True)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        with pytest.raises(UserError, match=message):
            from_pretrained(tmp_path)
