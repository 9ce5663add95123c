"""Tokenizers of models that continue text give the tokens of transformers."""

import json
import shutil

import pytest

from surm_jax.data import load_tokenizer
from surm_jax.data.lm.tokenizer import load_prompt_tokenizer
from surm_jax.errors import UserError
from tests.data.lm.chats import CHAT, MARKED, PLAIN, write_tokenizer

REASON = "compares with transformers: pip install -r requirements-peers.txt"
TEXTS = ["Once upon a time", "Hi <s> there</s> x", "  Zoë \n\n 雨 12", "", "it's WET<|e|> \n now", "<unk>a", "a  b   c"]
CASES = [
    ("llama", {}),
    ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}),
    ("llama", {"tokenizer_class": "LlamaTokenizerFast"}),
    ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_eos_token": True, "add_bos_token": True}),
    ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "pad_token": "<p>"}),
    ("mistral", {"tokenizer_class": "LlamaTokenizerFast"}),
    ("qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("qwen3", {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "</s>"}),
    ("qwen3", {}),
    ("gemma2", {"tokenizer_class": "GemmaTokenizerFast", "bos_token": "<s>", "unk_token": "</s>"}),
    ("gemma3_text", {"tokenizer_class": "PreTrainedTokenizerFast"}),
]


@pytest.fixture(params=["bytes", "stories"])
def folder(request, tmp_path):
    if request.param == "stories":
        shutil.copytree(request.getfixturevalue("shared") / "data/weights/stories260k", tmp_path / "t")
        (tmp_path / "t").chmod(0o755)
        for file in (tmp_path / "t").iterdir():
            file.chmod(0o644)
        return tmp_path / "t"
    return write_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(("model_type", "settings"), CASES, ids=str)
def test_the_tokens_are_those_of_transformers(folder, model_type, settings):
    transformers = pytest.importorskip("transformers", reason=REASON)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_prompt_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode([text])[0].ids
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert [*ours.start, *ids] == theirs.encode(text), text
    assert ours.end == theirs.eos_token_id


@pytest.mark.parametrize("where", ["settings", "file", "list"])
@pytest.mark.parametrize("template", [PLAIN, MARKED, "{% for m in messages %}{{ m | tojson }}{{ m.name }}{% endfor %}"])
def test_chats_are_those_of_transformers(tmp_path, template, where):
    transformers = pytest.importorskip("transformers", reason=REASON)
    said = [{"name": "default", "template": template}, {"name": "other", "template": "x"}]
    folder = write_tokenizer(tmp_path / "t", said if where == "list" else template)
    if where == "file":
        write_tokenizer(folder, "not this one")
        (folder / "chat_template.jinja").write_text(template)
    ours, theirs = load_prompt_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in (False, True):
        text = ours.template.render(CHAT, prompt=prompt).text
        assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
        assert ours.encode([text])[0].ids == ids


BAD_TEMPLATES = {
    "{% for %}": "chat template is damaged",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% set n = namespace(__class__=1) %}": "attribute __class__",
    "{{ messages.append(1) }}": "not safe|unsafe|mutable",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ strftime_now('%d') }}": "undefined",
    "{{ range(99999999) | list }}": "too big|Range",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_template_of_strangers_cannot_reach_out(tmp_path, template):
    with pytest.raises((UserError, ValueError), match=BAD_TEMPLATES[template]):
        load_prompt_tokenizer(write_tokenizer(tmp_path / "t", template)).template.render(CHAT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "classifies text and continues none"),
        ({"tokenizer_class": "XLNetTokenizer"}, "known are .*LlamaTokenizer"),
        ({"chat_template": 3}, "chat_template is 3, but must be text"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load_prompt_tokenizer(write_tokenizer(tmp_path / "t", **settings))
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_prompt_tokenizer(tmp_path)


def test_a_tokenizer_of_a_decoder_does_not_classify(tmp_path):
    with pytest.raises(UserError, match="continues text and classifies none"):
        load_tokenizer(write_tokenizer(tmp_path / "t", tokenizer_class="Qwen2Tokenizer"))
