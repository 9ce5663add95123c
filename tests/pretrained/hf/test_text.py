import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from surm_jax.errors import UserError
from surm_jax.models import BertConfig
from surm_jax.pretrained.hf import ARCHITECTURES, Names, architecture_of
from tests.peft.models import parameters
from tests.pretrained.hf.hf_trees import read_tree, written_tree

BERT, ROBERTA = ARCHITECTURES["bert"], ARCHITECTURES["roberta"]

# All axes of an array have different sizes, except in square kernels, so that a test fails if two axes are exchanged.
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 14,
    "type_vocab_size": 2,
}
BODY = {
    "embeddings.word_embeddings.weight": (23, 12),
    "embeddings.position_embeddings.weight": (14, 12),
    "embeddings.token_type_embeddings.weight": (2, 12),
    "embeddings.LayerNorm.gamma": (12,),
    "embeddings.LayerNorm.beta": (12,),
    "pooler.dense.weight": (12, 12),
    "pooler.dense.bias": (12,),
}
LAYER = {
    "attention.self.query.weight": (12, 12),
    "attention.self.query.bias": (12,),
    "attention.self.key.weight": (12, 12),
    "attention.self.key.bias": (12,),
    "attention.self.value.weight": (12, 12),
    "attention.self.value.bias": (12,),
    "attention.output.dense.weight": (12, 12),
    "attention.output.dense.bias": (12,),
    "attention.output.LayerNorm.gamma": (12,),
    "attention.output.LayerNorm.beta": (12,),
    "intermediate.dense.weight": (20, 12),
    "intermediate.dense.bias": (20,),
    "output.dense.weight": (12, 20),
    "output.dense.bias": (12,),
    "output.LayerNorm.gamma": (12,),
    "output.LayerNorm.beta": (12,),
}
# The shapes of the arrays that google-bert/bert-base-uncased and FacebookAI/roberta-base have outside the body.
HEADS = {
    "bert": {
        "cls.predictions.bias": (23,),
        "cls.predictions.transform.dense.weight": (12, 12),
        "cls.predictions.transform.dense.bias": (12,),
        "cls.predictions.transform.LayerNorm.gamma": (12,),
        "cls.predictions.transform.LayerNorm.beta": (12,),
        "cls.predictions.decoder.weight": (23, 12),
        "cls.seq_relationship.weight": (2, 12),
        "cls.seq_relationship.bias": (2,),
    },
    "roberta": {
        "lm_head.bias": (23,),
        "lm_head.dense.weight": (12, 12),
        "lm_head.dense.bias": (12,),
        "lm_head.layer_norm.weight": (12,),
        "lm_head.layer_norm.bias": (12,),
        "lm_head.decoder.weight": (23, 12),
    },
}


def official(model_type):
    """Return random arrays under the names of the official BERT or RoBERTa checkpoint.

    The arrays of norms are named gamma and beta for BERT, and weight and bias for RoBERTa.
    """
    body = {**BODY, **{f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}}
    shapes = {**{f"{model_type}.{name}": shape for name, shape in body.items()}, **HEADS[model_type]}
    if model_type == "roberta":
        shapes = {name.replace("gamma", "weight").replace("beta", "bias"): shape for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**arrays, f"{model_type}.embeddings.position_ids": np.arange(14)[None]}


def expected_body(arrays, prefix):
    """Return the parameters of our model without its head, converted one by one from a checkpoint."""
    arrays = {name.replace("gamma", "weight").replace("beta", "bias"): array for name, array in arrays.items()}
    result = {f"{n}_embed/embedding": arrays[f"{prefix}embeddings.{theirs}_embeddings.weight"]
              for n, theirs in (("word", "word"), ("position", "position"), ("type", "token_type"))}  # fmt: skip
    modules = {"embed_norm": "embeddings.LayerNorm"}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        modules |= {f"blocks/{i}/attention/{n}": f"{layer}.attention.self.{n}" for n in ("query", "key", "value")}
        modules |= {f"blocks/{i}/attention/out": f"{layer}.attention.output.dense"}
        modules |= {f"blocks/{i}/norm1": f"{layer}.attention.output.LayerNorm"}
        modules |= {
            f"blocks/{i}/mlp/up": f"{layer}.intermediate.dense",
            f"blocks/{i}/mlp/down": f"{layer}.output.dense",
        }
        modules |= {f"blocks/{i}/norm2": f"{layer}.output.LayerNorm"}
    for path, module in modules.items():
        weight, bias = (arrays[f"{prefix}{module}.{leaf}"] for leaf in ("weight", "bias"))
        heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
        if path.endswith(("query", "key", "value")):
            weight, bias = np.stack([weight[h].T for h in heads], 1), np.stack([bias[h] for h in heads])
        elif path.endswith("out"):
            weight = np.stack([weight[:, h].T for h in heads])
        else:
            weight = weight.T
        result |= {f"{path}/{'scale' if 'norm' in path else 'kernel'}": weight, f"{path}/bias": bias}
    return result


def assert_parameters(model, expected):
    found = parameters(model)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


class TestOfficialFiles:
    @pytest.mark.parametrize("prefix", ["bert.", ""])
    def test_bert_as_a_classifier_with_a_new_head(self, prefix):
        arrays = official("bert")
        expected = expected_body(arrays, "bert.")
        expected |= {
            "pooler/kernel": arrays["bert.pooler.dense.weight"].T,
            "pooler/bias": arrays["bert.pooler.dense.bias"],
        }
        expected |= {"head/kernel": np.zeros((12, 3)), "head/bias": np.zeros(3)}
        arrays = {prefix + name.removeprefix("bert."): array for name, array in arrays.items()
                  if prefix or not name.startswith("cls.")}  # fmt: skip
        arrays = {name.removeprefix("bert.") if ".cls." in name else name: array for name, array in arrays.items()}
        config = BERT.read_config(SIZES, {"num_classes": 3})
        assert_parameters(read_tree(BERT, config, arrays, ["head/"]), expected)

    @pytest.mark.parametrize("model_type", ["bert", "roberta"])
    def test_masked_language_models(self, model_type):
        arrays, architecture = official(model_type), ARCHITECTURES[model_type]
        expected = expected_body(arrays, f"{model_type}.")
        head = "cls.predictions.transform." if model_type == "bert" else "lm_head."
        norm = "LayerNorm.gamma LayerNorm.beta" if model_type == "bert" else "layer_norm.weight layer_norm.bias"
        expected |= {"head/transform/kernel": arrays[f"{head}dense.weight"].T}
        expected |= {"head/transform/bias": arrays[f"{head}dense.bias"]}
        expected |= {"head/bias": arrays["cls.predictions.bias" if model_type == "bert" else "lm_head.bias"]}
        expected |= dict(
            zip(["head/norm/scale", "head/norm/bias"], [arrays[head + n] for n in norm.split()], strict=True)
        )
        config = architecture.read_config({**SIZES, "architectures": ["RobertaForMaskedLM"]}, {})
        assert_parameters(read_tree(architecture, config, arrays), expected)

    def test_roberta_has_no_pooler_for_a_classifier(self):
        arrays = official("roberta")
        config = ROBERTA.read_config(SIZES, {"num_classes": 3})
        with pytest.raises(UserError, match="no key fills 'pooler/bias'"):
            read_tree(ROBERTA, config, arrays, ["head/"])
        expected = expected_body(arrays, "roberta.")
        expected |= {"pooler/kernel": np.zeros((12, 12)), "pooler/bias": np.zeros(12)}
        expected |= {"head/kernel": np.zeros((12, 3)), "head/bias": np.zeros(3)}
        assert_parameters(read_tree(ROBERTA, config, arrays, ["head/", "pooler/"]), expected)

    def test_a_model_without_a_pooler_leaves_it_out(self):
        config = BERT.read_config(SIZES, {"num_classes": 3, "pooler": False})
        assert "pooler/kernel" not in parameters(read_tree(BERT, config, official("bert"), ["head/"]))

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            (
                "bert.encoder.layer.0.crossattention.self.query.weight",
                "nothing reads the key 'bert.encoder.layer.0.cross",
            ),
            ("cls.prediction.bias", "nothing reads the key 'cls.prediction.bias'"),
            ("bert.encoder.layer.2.output.dense.bias", "'blocks/2/mlp/down/bias', which the model does not have"),
            ("bert.embeddings.LayerNorm.weight", "'embed_norm/scale' is filled by .*gamma' and by .*weight'"),
            ("encoder.layer.0.output.dense.bias", "'blocks/0/mlp/down/bias' is filled by"),
        ],
    )
    @pytest.mark.parametrize("head", ["classifier", "mlm"])
    def test_nothing_else_is_ignored(self, head, key, message):
        arrays = {**official("bert"), key: np.zeros(12, np.float32)}
        with pytest.raises(UserError, match=message):
            read_tree(BERT, BERT.read_config(SIZES, {"head": head}), arrays, ["head/"] if head == "classifier" else [])

    def test_real_encoder_without_embeddings(self, shared):
        arrays = load_file(shared / "data/weights/bert_tiny_sst2_encoder.safetensors")
        fields = json.loads((shared / "data/weights/bert_tiny_config.json").read_text())
        config = BERT.read_config(fields, {})
        assert config == BertConfig.from_variant("tiny", dropout=0.1)
        with pytest.raises(UserError) as error:
            read_tree(BERT, config, arrays)
        embeddings = ("word_embed/embedding", "position_embed/embedding", "type_embed/embedding")
        for path in (*embeddings, "embed_norm/scale", "embed_norm/bias"):
            assert f"no key fills {path!r}" in str(error.value)
        model = read_tree(BERT, config, arrays, [*embeddings, "embed_norm/"])
        written = {name: array for name, array in written_tree(BERT, model).items() if ".embeddings." not in name}
        assert written.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(written[name], array, err_msg=name)
        query = arrays["bert.encoder.layer.1.attention.self.query.weight"]
        np.testing.assert_array_equal(model.blocks[1].attention.query.kernel[...][:, 1, 5], query[64 + 5])


class TestReadConfig:
    def test_what_is_not_said_is_as_in_transformers(self):
        assert BERT.read_config({}, {}) == BertConfig.from_variant("base", dropout=0.1)
        roberta = {"vocab_size": 50265, "pad_token": 1, "positions": "after_padding"}
        assert ROBERTA.read_config({}, {}) == BertConfig.from_variant("base", dropout=0.1, **roberta)

    def test_everything_that_is_said(self):
        fields = {
            **SIZES,
            "layer_norm_eps": 1e-7,
            "pad_token_id": 4,
            "hidden_dropout_prob": 0.2,
            "hidden_act": "gelu_new",
        }
        expected = BertConfig(
            vocab_size=23,
            width=12,
            depth=2,
            heads=3,
            mlp_width=20,
            max_positions=14,
            type_vocab_size=2,
            num_classes=3,
            pad_token=4,
            epsilon=1e-7,
            activation="gelu_tanh",
            dropout=0.2,
        )
        labels = {"0": "no", "1": "yes", "2": "perhaps"}
        assert BERT.read_config({**fields, "id2label": labels, "position_embedding_type": "absolute"}, {}) == expected
        assert BERT.read_config({**fields, "num_labels": 3, "pruned_heads": {}, "is_decoder": False}, {}) == expected
        replaced = BERT.read_config(fields, {"dropout": 0.0, "num_classes": 7, "dtype": "bfloat16"})
        assert (replaced.dropout, replaced.num_classes, replaced.dtype) == (0.0, 7, "bfloat16")

    @pytest.mark.parametrize(
        ("architectures", "overrides", "head"),
        [
            (["BertModel"], {}, "classifier"),
            (["BertForSequenceClassification"], {}, "classifier"),
            (["BertForMaskedLM"], {}, "mlm"),
            (["BertForPreTraining"], {}, "mlm"),
            (["BertForMaskedLM"], {"num_classes": 2}, "classifier"),
            (["BertForMaskedLM"], {"num_classes": 2, "head": "mlm"}, "mlm"),
            (["BertForSequenceClassification"], {"head": "mlm"}, "mlm"),
            (None, {}, "classifier"),
        ],
    )
    def test_head(self, architectures, overrides, head):
        assert BERT.read_config({**SIZES, "architectures": architectures}, overrides).head == head

    @pytest.mark.parametrize(
        ("model_type", "fields", "overrides", "message"),
        [
            ("bert", {"position_embedding_type": "relative_key"}, {}, "position_embedding_type = 'relative_key'"),
            ("bert", {"hidden_act": "mish"}, {}, "hidden_act = 'mish', but there are 'gelu'"),
            ("bert", {"hidden_act": "gelu_ne"}, {}, "did you mean 'gelu_new'"),
            ("roberta", {"is_decoder": True}, {}, "this roberta cannot be read: config.json says is_decoder = True"),
            ("bert", {"is_encoder_decoder": True}, {}, "is_encoder_decoder = True"),
            ("bert", {"add_cross_attention": True}, {}, "add_cross_attention = True"),
            ("bert", {"pruned_heads": {"0": [1]}}, {}, "pruned_heads = {'0': "),
            ("bert", {"tie_word_embeddings": False}, {"head": "mlm"}, "tie_word_embeddings = False"),
            (
                "roberta",
                {"hidden_act": "relu"},
                {"head": "mlm"},
                "hidden_act = 'relu', but RoBERTa's head always has 'gelu'",
            ),
            ("bert", {}, {"num_class": 3}, "no field 'num_class'.*did you mean 'num_classes'"),
            ("bert", {"num_attention_heads": 5}, {}, "5 heads for width 12"),
            ("bert", {"hidden_size": "12"}, {}, "width must be a positive integer, got '12'"),
        ],
    )
    def test_what_our_model_cannot_express_is_refused(self, model_type, fields, overrides, message):
        with pytest.raises(UserError, match=message):
            ARCHITECTURES[model_type].read_config({**SIZES, **fields}, overrides)

    def test_a_classifier_needs_no_tied_embeddings(self):
        assert BERT.read_config({**SIZES, "tie_word_embeddings": False}, {}).head == "classifier"


class TestWriteConfig:
    @pytest.mark.parametrize(
        "fields",
        [
            {"num_classes": 3, "activation": "gelu_tanh", "epsilon": 1e-6, "dropout": 0.3},
            {"head": "mlm", "activation": "relu", "num_classes": 7},
            {"positions": "after_padding", "pad_token": 1, "activation": "quick_gelu", "type_vocab_size": 1},
            {"positions": "after_padding", "pad_token": 3, "head": "mlm"},
        ],
    )
    def test_is_read_back(self, fields):
        config = BertConfig.from_variant("tiny", **fields)
        architecture = architecture_of(config)
        written = json.loads(json.dumps(architecture.write_config(config)))
        assert written["model_type"] == architecture.model_type
        assert architecture.read_config(written, {}) == config

    @pytest.mark.parametrize(
        ("architecture", "fields", "message"),
        [
            (BERT, {"positions": "after_padding"}, "bert has positions 'absolute', the model has 'after_padding'"),
            (ROBERTA, {}, "roberta has positions 'after_padding', the model has 'absolute'"),
            (BERT, {"pooler": False}, "BertForSequenceClassification has a pooler, the model has none"),
            (
                ROBERTA,
                {"positions": "after_padding", "head": "mlm", "activation": "relu"},
                "RobertaForMaskedLM has the activation 'gelu' in its head, the model has 'relu'",
            ),
        ],
    )
    def test_what_transformers_cannot_express_is_refused(self, architecture, fields, message):
        with pytest.raises(UserError, match=message):
            architecture.write_config(BertConfig.from_variant("tiny", **fields))


@pytest.mark.parametrize(
    ("architecture", "head", "path", "name"),
    [
        (BERT, "classifier", "blocks/11/attention/query", "bert.encoder.layer.11.attention.self.query"),
        (ROBERTA, "mlm", "blocks/0/mlp/down", "roberta.encoder.layer.0.output.dense"),
        (BERT, "classifier", "pooler", "bert.pooler.dense"),
        (ROBERTA, "classifier", "pooler", "classifier.dense"),
        (BERT, "classifier", "head", "classifier"),
        (ROBERTA, "classifier", "head", "classifier.out_proj"),
        (BERT, "mlm", "head/transform", "cls.predictions.transform.dense"),
    ],
)
def test_names_of_modules(architecture, head, path, name):
    assert Names(architecture, BertConfig.from_variant("tiny", head=head)).modules(path) == (name,)


@pytest.mark.parametrize(
    ("fields", "patterns"),
    [
        ({}, {"head/.*"}),
        ({"positions": "after_padding"}, {"head/.*", "pooler/.*"}),
        ({"positions": "after_padding", "pooler": False}, {"head/.*"}),
        ({"head": "mlm"}, set()),
        ({"head": "mlm", "positions": "after_padding"}, set()),
    ],
)
def test_what_a_new_task_begins_with(fields, patterns):
    assert set(BertConfig.from_variant("tiny", **fields).new_head) == patterns
