"""Check that surm_jax loads adapter folders of Hugging Face's peft, and that peft loads those of surm_jax.

The tests are skipped if torch, transformers or peft is not installed (`requirements-peers.txt`).
"""

import copy
import functools
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from surm_jax.peft import C3A, CirculantUpdate, GraLoRA, LoKr, LoRA, Rule, adapt, load_peft, save_peft
from surm_jax.pretrained.hf import ARCHITECTURES
from surm_jax.pretrained.hf.architecture import Names
from tests.peft.models import CONFIG, TENSORS, perturb, relative_error
from tests.pretrained.hf.hf_trees import read_tree
from tests.speeds import fast

REASON = "compares with a PyTorch library: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

BODY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
IMAGE = {**BODY, "image_size": 8, "patch_size": 4, "num_channels": 2}
DINOV2 = {**{name: size for name, size in IMAGE.items() if name != "intermediate_size"}, "mlp_ratio": 2}
TEXT = {**BODY, "vocab_size": 11, "max_position_embeddings": 9}
LABELS = {"num_labels": 7}
DECODER = {**TEXT, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "tie_word_embeddings": False}
WORDS = ("bert", "roberta", "llama", "gemma3")

PEERS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, **LABELS)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**IMAGE, **LABELS)),
    "ijepa": lambda: transformers.IJepaForImageClassification(transformers.IJepaConfig(**IMAGE, **LABELS)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2, **LABELS)),
    "clip": lambda: transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=IMAGE, **LABELS)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, **LABELS)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**TEXT, **LABELS, pad_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**DECODER)),
}
HEAD = ("head/.*",)
WHOLE = "all-linear"


@functools.cache
def peer(name):
    """Return a transformers model with random parameters. All tests share it. Only copies are passed to peft."""
    torch.manual_seed(0)
    model = PEERS[name]().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@functools.cache
def base(name):
    """Return our model with the parameters of `peer`, and the names of its modules in transformers."""
    theirs = peer(name)
    architecture = ARCHITECTURES[theirs.config.model_type]
    fields = json.loads(theirs.config.to_json_string(use_diff=False))
    config = architecture.read_config({**fields, "architectures": [type(theirs).__name__]}, {})
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    return read_tree(architecture, config, arrays), Names(architecture, config)


def logits(name, model):
    if name in WORDS:
        return model(jnp.asarray([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]))
    return model(jnp.asarray(IMAGES))


IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 2)).astype(np.float32)


@torch.no_grad()
def their_logits(name, model):
    if name in WORDS:
        return model(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])).logits.numpy()
    return model(pixel_values=torch.tensor(IMAGES.transpose(0, 3, 1, 2))).logits.numpy()


def their_model(name, folder):
    """Return a transformers model with an adapter that peft loaded. Warnings, as of a missing tensor, are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Ignore warnings about deprecated functions, which have nothing to do with the adapter.
        warnings.simplefilter("ignore", category=FutureWarning)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(peer(name)), folder)
    # Every tensor in the file must be in the model.
    state = peft.get_peft_model_state_dict(model)
    tensors = load_file(folder / TENSORS)
    assert state.keys() == tensors.keys()
    assert all(np.array_equal(state[key], tensor) for key, tensor in tensors.items())
    return model


OURS = {
    "lora": [Rule(WHOLE, LoRA(rank=2, alpha=0.7))],
    "ranks": [Rule(r"blocks/0/.*", LoRA(rank=2)), Rule(r"blocks/1/attention/.*", LoRA(rank=3, alpha=0.5))],
    "c3a": [Rule(WHOLE, C3A(alpha=3.0, block=2))],
    "blocks": [Rule("qv", C3A(alpha=3.0, block=4)), Rule("mlp", C3A(block=1))],
    "gralora": [Rule("qv", GraLoRA(rank=4, alpha=0.7)), Rule("mlp", GraLoRA(rank=4, alpha=1.5))],
    "circulant": [Rule("attention", CirculantUpdate(alpha=0.6, scale=0.5))],
    "circulant and c3a": [Rule("qv", CirculantUpdate(alpha=0.6)), Rule("mlp", C3A(alpha=3.0))],
    "lokr": [Rule(WHOLE, LoKr(rank=8, alpha=3.0))],
    "low-rank lokr": [Rule(WHOLE, LoKr(rank=1, alpha=0.7, divisor=2))],
    "both lokrs": [
        Rule("qv", LoKr(rank=1, alpha=0.7, divisor=2)),
        Rule("mlp", LoKr(rank=5, divisor=2)),
    ],
}
CASES = [(name, method) for name in PEERS for method in OURS if name in ("vit", "bert") or method == "lora"]
# The kernels of a Llama are rectangles here, and peft has no circulants of this shape.
CASES += [("llama", method) for method in OURS if method not in ("lora", "circulant", "circulant and c3a")]


def _is_quick(case):
    return case[:2] in (("vit", "lora"), ("vit", "c3a"), ("llama", "lokr"))


@pytest.mark.parametrize(("name", "method"), fast(CASES, where=_is_quick, unpack=True))
def test_peft_computes_what_ours_computes(name, method, tmp_path):
    model, names = base(name)
    adapted, adapter = adapt(model, OURS[method], train=HEAD, rngs=nnx.Rngs(0))
    adapted = perturb(adapted, adapter)
    save_peft(tmp_path / "adapter", adapted, adapter, names)
    ours = logits(name, adapted)
    assert relative_error(ours, logits(name, model)) > 0.01
    assert relative_error(ours, their_logits(name, their_model(name, tmp_path / "adapter"))) <= 1e-5

    read, recipe = load_peft(tmp_path / "adapter", model, names)
    assert relative_error(logits(name, read), ours) <= 1e-5
    save_peft(tmp_path / "again", read, recipe, names)
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


QV = r".*(q_proj|v_proj|query|value)"
LINEAR = r".*(layers?\.\d+\..*(q_proj|v_proj|query|value|fc[12]|dense|gate_proj|down_proj))"
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=QV, bias="none"),
    "patterns": lambda: peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=QV, rank_pattern={r"0\..*": 5}, alpha_pattern={r"(q_proj|query)": 3}
    ),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=5, alpha=7, target_modules=LINEAR),
    "low-rank lokr": lambda: peft.LoKrConfig(r=1, alpha=7, decompose_factor=2, target_modules=LINEAR),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=7, target_modules=LINEAR),
    "lokr patterns": lambda: peft.LoKrConfig(
        r=5,
        alpha=7,
        decompose_factor=2,
        target_modules=LINEAR,
        rank_pattern={"fc1": 1, "q_proj": 1, "query": 2},
        alpha_pattern={"layers.0.*": 3},
    ),
    "blocks": lambda: peft.C3AConfig(
        block_size=4,
        target_modules=["q_proj", "v_proj", "query", "value"],
        block_size_pattern={"v_proj": 3, "value": 6},
    ),
}


SAVED = {
    "nothing": None,
    "head": ["classifier"],
    "norms": ["layernorm_before", "LayerNorm", "norm1", "classifier", "input_layernorm", "lm_head"],
}
THEIR_CASES = [
    *((name, "lora", "norms") for name in PEERS),
    *((name, method, "nothing") for name in ("vit", "bert", "llama") for method in THEIRS),
    ("bert", "c3a", "head"),
]


@pytest.mark.parametrize(("name", "method", "saved"), fast(THEIR_CASES, where=_is_quick, unpack=True))
def test_ours_computes_what_peft_computes(name, method, saved, tmp_path):
    config = THEIRS[method]()
    config.modules_to_save = SAVED[saved]
    theirs = peft.get_peft_model(copy.deepcopy(peer(name)), config).eval()
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")

    model, names = base(name)
    adapted, adapter = load_peft(tmp_path / "theirs", model, names)
    expected = their_logits(name, theirs)
    assert relative_error(expected, their_logits(name, peer(name))) > 0.01
    assert relative_error(logits(name, adapted), expected) <= 1e-5
    save_peft(tmp_path / "ours", adapted, adapter, names)
    first, second = load_file(tmp_path / "theirs" / TENSORS), load_file(tmp_path / "ours" / TENSORS)
    assert first.keys() == second.keys()
    assert all(np.array_equal(tensor, second[key]) for key, tensor in first.items())
    assert relative_error(their_logits(name, their_model(name, tmp_path / "ours")), expected) <= 1e-6


def test_both_factors_of_lokr_decomposed(tmp_path):
    config = peft.LoKrConfig(r=1, alpha=2, decompose_both=True, target_modules=QV, init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(peer("vit")), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert any(key.endswith("lokr_w1_a") for key in load_file(tmp_path / "theirs" / TENSORS))
    adapted, adapter = load_peft(tmp_path / "theirs", *base("vit"))
    expected = their_logits("vit", theirs)
    assert relative_error(logits("vit", adapted), expected) <= 1e-5
    save_peft(tmp_path / "ours", adapted, adapter, base("vit")[1])
    assert relative_error(their_logits("vit", their_model("vit", tmp_path / "ours")), expected) <= 1e-5


def test_an_adapter_for_the_sequence_classification_of_peft(tmp_path):
    """Check that the head, which peft trains without being asked, is loaded like any other module."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(peer("roberta")), config).eval()
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.3
    theirs.save_pretrained(tmp_path / "theirs")
    adapted, adapter = load_peft(tmp_path / "theirs", *base("roberta"))
    assert adapter.train == ("head/.*", "pooler/.*")
    assert relative_error(logits("roberta", adapted), their_logits("roberta", theirs)) <= 1e-5
