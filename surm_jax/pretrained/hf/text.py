"""Register BERT and RoBERTa, so that folders of transformers with these models can be read and written.

Our `Bert` with a classifier corresponds to `BertForSequenceClassification` or `RobertaForSequenceClassification`. With
the head of a masked language model, it corresponds to `BertForMaskedLM` or `RobertaForMaskedLM`. Checkpoints without a
head, and those of `BertForPreTraining` with two heads, can be read too.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from surm_jax.errors import UserError
from surm_jax.models import Bert, BertConfig
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

_BODY = (
    Name("embeddings.word_embeddings", "word_embed", EMBEDDING),
    Name("embeddings.position_embeddings", "position_embed", EMBEDDING),
    Name("embeddings.token_type_embeddings", "type_embed", EMBEDDING),
    Name("embeddings.LayerNorm", "embed_norm", NORM),
    Name("encoder.layer.#.attention.self.query", "blocks/#/attention/query", LINEAR),
    Name("encoder.layer.#.attention.self.key", "blocks/#/attention/key", LINEAR),
    Name("encoder.layer.#.attention.self.value", "blocks/#/attention/value", LINEAR),
    Name("encoder.layer.#.attention.output.dense", "blocks/#/attention/out", LINEAR_OUT),
    Name("encoder.layer.#.attention.output.LayerNorm", "blocks/#/norm1", NORM),
    Name("encoder.layer.#.intermediate.dense", "blocks/#/mlp/up", LINEAR),
    Name("encoder.layer.#.output.dense", "blocks/#/mlp/down", LINEAR),
    Name("encoder.layer.#.output.LayerNorm", "blocks/#/norm2", NORM),
)
_BIAS = LINEAR[1]

_HEADS: Mapping[tuple[str, str], tuple[Name, ...]] = {
    ("bert", "classifier"): (
        Name("pooler.dense", "pooler", LINEAR),
        Name("classifier", "head", LINEAR, in_body=False),
    ),
    ("bert", "mlm"): (
        Name("cls.predictions.transform.dense", "head/transform", LINEAR, in_body=False),
        Name("cls.predictions.transform.LayerNorm", "head/norm", NORM, in_body=False),
        Name("cls.predictions", "head", (_BIAS,), in_body=False),
    ),
    ("roberta", "classifier"): (
        Name("classifier.dense", "pooler", LINEAR, in_body=False),
        Name("classifier.out_proj", "head", LINEAR, in_body=False),
    ),
    ("roberta", "mlm"): (
        Name("lm_head.dense", "head/transform", LINEAR, in_body=False),
        Name("lm_head.layer_norm", "head/norm", NORM, in_body=False),
        Name("lm_head", "head", (_BIAS,), in_body=False),
    ),
}

# An array of the numbers 0, 1, ..., which old checkpoints store.
_POSITION_IDS = r"embeddings\.position_ids"
# Regular expressions for the keys that are not read. The arrays of the decoder are copies of the word embeddings and of
# the head's bias.
_IGNORED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("bert", "classifier"): (_POSITION_IDS, r"cls\.predictions\..*", r"cls\.seq_relationship\..*"),
    ("bert", "mlm"): (
        _POSITION_IDS,
        r"cls\.predictions\.decoder\..*",
        r"cls\.seq_relationship\..*",
        r"pooler\.dense\..*",
        r"classifier\..*",
    ),
    # RoBERTa's classifier has a dense layer of its own, which it uses instead of the pooler in the body.
    ("roberta", "classifier"): (_POSITION_IDS, r"lm_head\..*", r"pooler\.dense\..*"),
    ("roberta", "mlm"): (_POSITION_IDS, r"lm_head\.decoder\..*", r"pooler\.dense\..*", r"classifier\..*"),
}

# The head's decoder, and the arrays that its weight and its bias are copies of.
_COPIES: Mapping[str, Mapping[str, str]] = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
}

_CLASSES: Mapping[tuple[str, str], str] = {
    ("bert", "classifier"): "BertForSequenceClassification",
    ("bert", "mlm"): "BertForMaskedLM",
    ("roberta", "classifier"): "RobertaForSequenceClassification",
    ("roberta", "mlm"): "RobertaForMaskedLM",
}
_POSITIONS = {"bert": "absolute", "roberta": "after_padding"}

_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "epsilon": "layer_norm_eps",
    "pad_token": "pad_token_id",
    "dropout": "hidden_dropout_prob",
}
"""The names of our fields, mapped to those fields of `config.json` that have the same values."""

# The values that transformers uses for fields that are missing in config.json.
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "hidden_act": "gelu",
}
_DEFAULTS = {"bert": _BERT_DEFAULTS, "roberta": {**_BERT_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}}

_MLM_CLASSES = ("ForMaskedLM", "ForPreTraining")


def _read_config(model_type: str, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> BertConfig:
    """Convert the content of a `config.json` to our configuration.

    The model has the head of a masked language model if `architectures` names a class with this head, and otherwise a
    classifier. The overrides `head` and `num_classes` take precedence; the latter selects a classifier.
    `hidden_dropout_prob` becomes the dropout rate of all layers. The dropout rates of attention probabilities and of
    the classifier are ignored, since they do not change what a trained model computes.

    Raises:
        UserError: The file describes a model that `Bert` cannot represent, or an override is no field of `BertConfig`.
    """
    known = {**_DEFAULTS[model_type], **{name: value for name, value in fields.items() if value is not None}}
    for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads"):
        if known.get(name):
            raise refusal(model_type, name, known[name], "our Bert is an encoder of full width")
    if known.get("position_embedding_type", "absolute") != "absolute":
        what = "only 'absolute' positions are supported"
        raise refusal(model_type, "position_embedding_type", known["position_embedding_type"], what)
    activation = our_activation(model_type, known["hidden_act"])
    is_mlm = "num_classes" not in overrides and any(
        str(name).endswith(_MLM_CLASSES) for name in known.get("architectures", ())
    )
    ours = {
        **{name: known[theirs] for name, theirs in _FIELDS.items()},
        "num_classes": len(known["id2label"]) if "id2label" in known else known.get("num_labels", 2),
        "head": "mlm" if is_mlm else "classifier",
        "positions": _POSITIONS[model_type],
        "activation": activation,
    }
    config = BertConfig.build(ours, overrides)
    if config.head == "mlm":
        if not known.get("tie_word_embeddings", True):
            what = "our masked language model shares the word embeddings with its head"
            raise refusal(model_type, "tie_word_embeddings", False, what)
        if model_type == "roberta" and config.activation != "gelu":
            raise refusal(model_type, "hidden_act", known["hidden_act"], "RoBERTa's head always has 'gelu'")
    return config


def _write_config(model_type: str, config: BertConfig) -> dict[str, Any]:
    """Convert our configuration to the content of a `config.json`.

    It holds the number of classes, but not their names. The dropout rate of attention probabilities is 0, as in our
    model.

    Raises:
        UserError: transformers has no such model.
    """
    if config.positions != _POSITIONS[model_type]:
        raise UserError(
            f"transformers' {model_type} has positions {_POSITIONS[model_type]!r}, the model has {config.positions!r}"
        )
    if config.head == "classifier" and not config.pooler:
        raise UserError(f"transformers' {_CLASSES[model_type, 'classifier']} has a pooler, the model has none")
    if config.head == "mlm" and model_type == "roberta" and config.activation != "gelu":
        raise UserError(
            f"transformers' {_CLASSES['roberta', 'mlm']} has the activation 'gelu' in its head, "
            f"the model has {config.activation!r}"
        )
    return {
        "architectures": [_CLASSES[model_type, config.head]],
        "model_type": model_type,
        **{theirs: getattr(config, name) for name, theirs in _FIELDS.items()},
        "hidden_act": next(theirs for theirs, name in ACTIVATIONS.items() if name == config.activation),
        "attention_probs_dropout_prob": 0.0,
        "num_labels": config.num_classes,
    }


def _has_positions(positions: str, config: BertConfig) -> bool:
    return config.positions == positions


def _names(model_type: str, config: BertConfig) -> tuple[Name, ...]:
    return (*_BODY, *_HEADS[model_type, config.head])


def _ignore(model_type: str, config: BertConfig) -> tuple[str, ...]:
    without_pooler = (r"pooler\.dense\..*",) if config.head == "classifier" and not config.pooler else ()
    return (*_IGNORED[model_type, config.head], *without_pooler)


def _copies(model_type: str, config: BertConfig) -> Mapping[str, str]:
    return _COPIES[model_type] if config.head == "mlm" else {}


for _model_type in ("bert", "roberta"):
    register_architecture(
        Architecture(
            model_type=_model_type,
            prefix=f"{_model_type}.",
            model=Bert,
            read_config=partial(_read_config, _model_type),
            write_config=partial(_write_config, _model_type),
            names=partial(_names, _model_type),
            ignore=partial(_ignore, _model_type),
            copies=partial(_copies, _model_type),
            chosen=partial(_has_positions, _POSITIONS[_model_type]),
        )
    )
