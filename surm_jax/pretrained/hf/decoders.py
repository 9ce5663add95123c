"""Register decoders (Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3), so that their folders can be read and written.

Our `Decoder` corresponds to the classes `...ForCausalLM` of transformers. In this file, "their" and "theirs" refer to
transformers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from surm_jax.errors import UserError
from surm_jax.models import Decoder, DecoderConfig
from surm_jax.pretrained.hf.architecture import (
    ACTIVATIONS,
    EMBEDDING,
    LINEAR,
    LINEAR_OUT,
    NORM,
    Architecture,
    Name,
    our_activation,
    refusal,
    register_architecture,
)

_LAYER, _BLOCK = "layers.#.", "blocks/#/"
_NAMES = (
    Name("embed_tokens", "embed", EMBEDDING),
    Name(_LAYER + "self_attn.q_proj", _BLOCK + "attention/query", LINEAR),
    Name(_LAYER + "self_attn.k_proj", _BLOCK + "attention/key", LINEAR),
    Name(_LAYER + "self_attn.v_proj", _BLOCK + "attention/value", LINEAR),
    Name(_LAYER + "self_attn.o_proj", _BLOCK + "attention/out", LINEAR_OUT),
    Name(_LAYER + "self_attn.q_norm", _BLOCK + "attention/query_norm", NORM),
    Name(_LAYER + "self_attn.k_norm", _BLOCK + "attention/key_norm", NORM),
    Name(_LAYER + "mlp.gate_proj", _BLOCK + "mlp/gate", LINEAR),
    Name(_LAYER + "mlp.up_proj", _BLOCK + "mlp/up", LINEAR),
    Name(_LAYER + "mlp.down_proj", _BLOCK + "mlp/down", LINEAR),
    Name(_LAYER + "input_layernorm", _BLOCK + "norm1", NORM),
    Name("norm", "norm", NORM),
    Name("lm_head", "head", LINEAR, in_body=False),
)
# In a block with two norms, the second one has the name that a block with four norms gives to another one.
_TWO_NORMS = (Name(_LAYER + "post_attention_layernorm", _BLOCK + "norm2", NORM),)
_FOUR_NORMS = (
    Name(_LAYER + "post_attention_layernorm", _BLOCK + "post_norm1", NORM),
    Name(_LAYER + "pre_feedforward_layernorm", _BLOCK + "norm2", NORM),
    Name(_LAYER + "post_feedforward_layernorm", _BLOCK + "post_norm2", NORM),
)

_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "epsilon": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "begin_token": "bos_token_id",
    "pad_token": "pad_token_id",
}
"""The names of our fields, mapped to those fields of `config.json` that have the same values."""

# The values that transformers uses for fields that are missing in config.json, in all families that do not have others.
_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
}
_LLAMA = {
    "vocab_size": 32_000,
    "intermediate_size": 11_008,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = {
    "vocab_size": 32_000,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 4096,
}
_QWEN = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3 = {
    **{name: value for name, value in _GEMMA.items() if name != "attn_logit_softcapping"},
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
_GEMMA_PARTS = {"post_norms": True, "unit_offset": True, "scaled_embed": True}


@dataclasses.dataclass(frozen=True)
class _Family:
    """A family of decoders: its class in transformers, the defaults, and the fields of ours that all models share."""

    architecture: str
    defaults: Mapping[str, Any]
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", _LLAMA),
    "mistral": _Family("MistralForCausalLM", _MISTRAL),
    "qwen2": _Family("Qwen2ForCausalLM", _QWEN, {"qkv_bias": True, "out_bias": False}),
    "qwen3": _Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, {"qk_norm": True}),
    "gemma2": _Family("Gemma2ForCausalLM", _GEMMA, _GEMMA_PARTS),
    "gemma3_text": _Family("Gemma3ForCausalLM", _GEMMA3, {**_GEMMA_PARTS, "qk_norm": True}),
}

# Fields that change what a model computes, and the values with which they change nothing. A family that has none of
# these fields among its defaults does not implement it, so another value is refused.
_NEUTRAL: Mapping[str, Any] = {
    "mlp_bias": False,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": None,
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_MOST_LAYERS = 1000
_FULL, _SLIDING = "full_attention", "sliding_attention"
# The parameters that each type of rotary positions needs.
_ROPE_KEYS: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_ANY_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}.union(*_ROPE_KEYS.values())


def _read_config(model_type: str, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> DecoderConfig:
    """Convert the content of a `config.json` to our configuration.

    Dropout rates are ignored, since they do not change what a trained model computes.

    Raises:
        UserError: The file describes a model that `Decoder` cannot represent, or an override is no field of
            `DecoderConfig`.
    """
    if "num_classes" in overrides:
        raise UserError(f"a {model_type} continues text and has no classes: choose a BERT or RoBERTa to classify text")
    family = _FAMILIES[model_type]
    known = {**_DEFAULTS, **family.defaults, **fields}
    for name, neutral in _NEUTRAL.items():
        if name not in family.defaults and fields.get(name) not in (None, neutral):
            raise refusal(model_type, name, fields[name], f"our {model_type} has no such part")
    activation = known["hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"]
    ends = known["eos_token_id"]
    ours = {
        **{name: known[theirs] for name, theirs in _FIELDS.items()},
        "family": model_type,
        "activation": our_activation(model_type, activation),
        "qkv_bias": bool(known.get("attention_bias")),
        "out_bias": bool(known.get("attention_bias")),
        "mlp_bias": bool(known.get("mlp_bias")),
        "score_width": known.get("query_pre_attn_scalar") or 0,
        "attention_softcap": known.get("attn_logit_softcapping") or 0,
        "logit_softcap": known.get("final_logit_softcapping") or 0,
        "end_tokens": () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        **_read_layers(model_type, known),
        **_read_rope(model_type, known),
        **family.parts,
    }
    if ours["kv_heads"] is None:
        ours["kv_heads"] = ours["heads"]
    if ours["head_width"] is None:
        ours["head_width"] = ours["width"] // ours["heads"]
    return DecoderConfig.build(ours, overrides)


def _read_layers(model_type: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pattern of global and local blocks, in its shortest repeating form, and the window of local blocks.

    Raises:
        UserError: The list of layers does not fit the model, or there are local blocks without a window.
    """
    depth, window = known["num_hidden_layers"], known.get("sliding_window")
    if not isinstance(depth, int) or not 0 < depth <= _MOST_LAYERS:
        raise refusal(model_type, "num_hidden_layers", depth, f"a model has 1 to {_MOST_LAYERS} layers")
    if model_type.startswith("qwen") and not known["use_sliding_window"]:
        window = None
    if model_type == "gemma2":
        kinds = [(_SLIDING, _FULL)[index % 2] for index in range(depth)]
    elif model_type == "gemma3_text":
        every = known["sliding_window_pattern"]
        kinds = [_SLIDING if (index + 1) % every else _FULL for index in range(depth)]
    else:
        first = known.get("max_window_layers", 0) if window is not None else depth
        kinds = [_FULL if index < first else _SLIDING for index in range(depth)]
    given = known.get("layer_types")
    if given is not None:
        free = "layer_types" in _FAMILIES[model_type].defaults
        if len(given) != depth or {*given} - {_FULL, _SLIDING} or not (free or given == kinds):
            what = f"our {model_type} has {depth} layers of {_FULL}{f' or {_SLIDING}' if free else ''}"
            raise refusal(model_type, "layer_types", given, what if free or window is None else f"it has {kinds}")
        kinds = given
    if _SLIDING not in kinds:
        return {"layer_pattern": "G", "window": 0}
    if window is None:
        raise refusal(model_type, "sliding_window", None, f"there are layers of {_SLIDING}")
    letters = "".join("L" if kind == _SLIDING else "G" for kind in kinds)
    periods = (letters[:end] for end in range(1, depth + 1))
    return {"layer_pattern": next(p for p in periods if (p * depth)[:depth] == letters), "window": window}


def _read_rope(model_type: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields of rotary positions.

    Up to version 4, transformers writes `rope_theta` and `rope_scaling`, and for Gemma 3 `rope_local_base_freq`. From
    version 5 on it writes `rope_parameters`, which for Gemma 3 has an entry for each kind of layers.

    Raises:
        UserError: The type of the positions is unknown, or a parameter is missing or unknown.
    """
    name = "rope_scaling" if known.get("rope_scaling") else "rope_parameters"
    rope = known.get(name) or {}
    ours: dict[str, Any] = {}
    if model_type == "gemma3_text":
        ours["local_rope_theta"] = known["rope_local_base_freq"]
        if name == "rope_parameters" and rope:
            if rope.keys() - {_FULL, _SLIDING}:
                raise refusal(model_type, name, rope, f"it must have the entries {_FULL} and {_SLIDING}")
            local = rope.get(_SLIDING) or {}
            if _rope_type(model_type, name, local) != "default":
                raise refusal(model_type, name, rope, f"our {model_type} has positions of type 'default' in {_SLIDING}")
            ours["local_rope_theta"] = local.get("rope_theta", ours["local_rope_theta"])
            rope = rope.get(_FULL) or {}
    kind = _rope_type(model_type, name, rope)
    ours |= {"rope_theta": rope.get("rope_theta", known["rope_theta"]), "rope_type": kind}
    positions = known.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope = {**rope, "original_max_position_embeddings": positions or known["max_position_embeddings"]}
    if missing := sorted(_ROPE_KEYS[kind] - rope.keys()):
        raise refusal(model_type, name, known.get(name), f"positions of type {kind!r} need {missing[0]!r}")
    if kind != "default":
        ours["rope_factor"] = rope["factor"]
    if kind == "llama3":
        ours |= {"rope_low": rope["low_freq_factor"], "rope_high": rope["high_freq_factor"]}
        ours["rope_positions"] = rope["original_max_position_embeddings"]
    return ours


def _rope_type(model_type: str, name: str, rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise refusal(model_type, name, kind, f"there are {', '.join(map(repr, _ROPE_KEYS))}")
    if unknown := sorted(rope.keys() - _ANY_ROPE_KEYS):
        raise refusal(model_type, f"{name}.{unknown[0]}", rope[unknown[0]], "our positions have no such parameter")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        what = "our positions turn all features of a head"
        raise refusal(model_type, f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], what)
    return kind


def _write_config(model_type: str, config: DecoderConfig) -> dict[str, Any]:
    """Convert our configuration to the content of a `config.json`, in a form that all versions of transformers read.

    Raises:
        UserError: transformers has no such model of this `model_type`. The message names the field of ours.
    """
    family = _FAMILIES[model_type]
    ends: Sequence[int] | int | None = [*config.end_tokens]
    if len(config.end_tokens) < 2:
        ends = config.end_tokens[0] if config.end_tokens else None
    options = {
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "query_pre_attn_scalar": config.score_width or None,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
        "sliding_window": config.window or None,
        "use_sliding_window": config.window > 0,
        "max_window_layers": config.kinds.count("G"),
        "layer_types": [_FULL if kind == "G" else _SLIDING for kind in config.kinds],
        "sliding_window_pattern": (*config.kinds, "G").index("G") + 1,
        "rope_local_base_freq": config.local_rope_theta,
    }
    scaling: dict[str, Any] | None = None
    if config.rope_type != "default":
        scaling = {"rope_type": config.rope_type, "factor": config.rope_factor}
    if scaling and config.rope_type == "llama3":
        scaling |= {"low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high}
        scaling["original_max_position_embeddings"] = config.rope_positions
    activation = next(theirs for theirs, name in ACTIVATIONS.items() if name == config.activation)
    fields = {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{theirs: getattr(config, name) for name, theirs in _FIELDS.items()},
        "eos_token_id": ends,
        "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act": activation,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
        **{name: value for name, value in options.items() if name in family.defaults},
    }
    again = _read_config(model_type, fields, {name: getattr(config, name) for name in config.RUNTIME_FIELDS})
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if ours != theirs:
            raise UserError(f"transformers' {model_type} has {field.name}={theirs!r}, but the model has {ours!r}")
    return fields


def _names(config: DecoderConfig) -> tuple[Name, ...]:
    return (*_NAMES, *(_FOUR_NORMS if config.post_norms else _TWO_NORMS))


def _ignore(config: DecoderConfig) -> tuple[str, ...]:
    # Old checkpoints store the frequencies of the rotary positions, which follow from the configuration.
    frequencies = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    return (frequencies, r"lm_head\.weight") if config.tied_head else (frequencies,)


def _copies(config: DecoderConfig) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied_head else {}


def _is_family(model_type: str, config: DecoderConfig) -> bool:
    return config.family == model_type


for _model_type in _FAMILIES:
    register_architecture(
        Architecture(
            model_type=_model_type,
            prefix="model.",
            model=Decoder,
            read_config=partial(_read_config, _model_type),
            write_config=partial(_write_config, _model_type),
            names=_names,
            ignore=_ignore,
            copies=_copies,
            chosen=partial(_is_family, _model_type),
        )
    )
