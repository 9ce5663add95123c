"""Compare tokenizers with random settings with those of transformers."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from surm_jax.data import TextSource, load_tokenizer, text_eval_batches
from surm_jax.errors import UserError
from tests.speeds import fast

REASON = "compares with transformers: pip install -r requirements-peers.txt"
TEXTS = [
    "It Zoë rains and pours .",
    "雨雨 it <new> [MASK] pour",
    "it [SEP] rain</s> NEW <mask> it it it it it it it it",
]
LENGTH = 12
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "It", "zoe", "zoë", "Zoë", "rain", "##s", "pour", "雨",
         "and", ".", "[X]", "new", "<", ">", "[", "]", "mask"]  # fmt: skip
NAMES = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token", "image_token"]


@pytest.fixture(scope="session")
def byte_pairs(tmp_path_factory):
    """A folder with a byte-pair vocabulary, as RoBERTa uses it, that was trained on the text of this file."""
    folder = tmp_path_factory.mktemp("byte_pairs")
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[X]"]
    trained.train_from_iterator([Path(__file__).read_text("utf-8")], vocab_size=350, special_tokens=special)
    trained.save_model(str(folder))
    return folder


def token(rng, form=0):
    content = str(rng.choice(["[X]", "[X]", "[X]", "<new>", "NEW", "it", "[SEP]", "</s>", "[MASK]"]))
    if form == 0 and rng.random() < 0.6:
        return content
    value = {"content": content} | {name: bool(rng.random() < 0.3) for name in ("lstrip", "rstrip", "normalized")}
    return value | ({"__type": "AddedToken"} if form == 0 and rng.random() < 0.8 else {}) | (
        {"special": bool(rng.random() < 0.5)} if rng.random() < 0.7 else {}
    )  # fmt: skip


def settings(rng, size):
    """Return random settings of a tokenizer, sometimes with a value of a wrong type."""

    def switch():
        return [True, False][rng.integers(2)] if rng.random() < 0.93 else [None, "no", 1][rng.integers(3)]

    every = {
        **dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space"), switch),
        "split_special_tokens": switch,
        "trim_offsets": switch,
        **{name: lambda: token(rng) for name in NAMES},
        "additional_special_tokens": lambda: [token(rng) for _ in range(rng.integers(3))],
        "extra_special_tokens": lambda: [[token(rng)], {"audio_token": token(rng)}, "it", []][rng.integers(4)],
        "padding_side": lambda: ["right", "right", "left", 3][rng.integers(4)],
        "truncation_side": lambda: ["right", "left", "left", "up"][rng.integers(4)],
        "model_max_length": lambda: [512, 10**30, 8, None, LENGTH][rng.integers(5)],
        "never_split": lambda: ["it"],
        "clean_up_tokenization_spaces": switch,
        "added_tokens_decoder": lambda: {
            str(size + rng.integers(-1, 2) + place): token(rng, 1) for place in range(rng.integers(1, 3))
        },
        "tokenizer_class": lambda: str(
            rng.choice([*["BertTokenizer", "RobertaTokenizerFast", "PreTrainedTokenizerFast"], "FooTokenizer"])
        ),
    }
    names = rng.choice(list(every), rng.integers(5), replace=False)
    return {str(name): every[str(name)]() for name in names}


def write_folder(folder, rng, byte_pairs):
    """Write a random tokenizer of BERT or RoBERTa, in one of two formats, with random settings. Return its kind."""
    kind = str(rng.choice(["bert", "roberta"]))
    bert, whole = rng.random() < 0.95 if kind == "bert" else rng.random() < 0.05, rng.random() < 0.5
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if bert:
        vocabulary = {word: number for number, word in enumerate(WORDS)}
        library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        said = {"lowercase": True, "strip_accents": None, "handle_chinese_chars": True}
        if rng.random() < 0.4:
            said = {name: bool(rng.random() < 0.5) for name in said}
        library.normalizer = normalizers.BertNormalizer(**said)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        special = WORDS[:5]
    else:
        names = [str(byte_pairs / name) for name in ("vocab.json", "merges.txt")]
        library = tokenizers.Tokenizer(models.BPE.from_file(*names))
        prefix = bool(rng.random() < 0.3)
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=prefix)
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    library.add_special_tokens(special)
    size = library.get_vocab_size()
    if rng.random() < 0.4:
        library.add_tokens([tokenizers.AddedToken("<new>", single_word=bool(rng.random() < 0.5))])
    if rng.random() < 0.3:
        library.enable_truncation(9, direction=str(rng.choice(["left", "right"])))
    if rng.random() < 0.3:
        library.enable_padding(pad_id=library.token_to_id(special[0]), pad_token=special[0])
    if whole:
        library.save(str(folder / "tokenizer.json"))
    elif bert:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    else:
        for name in ("vocab.json", "merges.txt"):
            (folder / name).write_bytes((byte_pairs / name).read_bytes())
    if rng.random() < 0.9:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings(rng, size)))
    if rng.random() < 0.4:
        values = {str(name): token(rng, int(rng.integers(2))) for name in rng.choice(NAMES, 2)}
        (folder / "special_tokens_map.json").write_text(json.dumps(values))
    if rng.random() < 0.3:
        values = {str(text): size + place for place, text in enumerate(rng.permutation(["<new>", "NEW"]))}
        (folder / "added_tokens.json").write_text(json.dumps(values))
    return f"{'WordPiece' if bert else 'BPE'} {'tokenizer.json' if whole else 'vocabulary'}"


@pytest.fixture(params=["tokenizer.json", "vocab.txt"])
def bert(request, tmp_path):
    """A folder with a BERT tokenizer, in one of two formats."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    if request.param == "tokenizer.json":
        load_tokenizer(tmp_path)._library.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "vocab.txt").unlink()
    return tmp_path


def tokens(folder, text="It Zoë <new> pour"):
    return load_tokenizer(folder).encode(TextSource([(text,)], [0]), 8).tokens.tolist()


ADDED = {"content": "<new>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("tokenizer_config.json", {}, [2, 5, 7, 18, 17, 19, 12, 3]),
        ("tokenizer_config.json", {"do_lower_case": False}, [2, 6, 9, 18, 17, 19, 12, 3]),
        ("tokenizer_config.json", {"strip_accents": False}, [2, 5, 8, 18, 17, 19, 12, 3]),
        ("special_tokens_map.json", {"bos_token": "[X]", "mask_token": "pour"}, [2, 5, 7, 18, 17, 19, 12, 3]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"23": ADDED}}, [2, 5, 7, 23, 12, 3]),
        ("added_tokens.json", {"<new>": 23}, [2, 5, 7, 23, 12, 3]),
        ("special_tokens_map.json", {"additional_special_tokens": ["<new>"]}, [2, 5, 7, 23, 12, 3]),
        ("special_tokens_map.json", {"unk_token": "[X]"}, [2, 5, 7, 18, 17, 19, 12, 3]),
        ("tokenizer_config.json", {"truncation_side": "left"}, [2, 5, 7, 18, 17, 19, 12, 3]),
        ("added_tokens.json", {"<new>": 40}, "'<new>' is token 40, but after its vocabulary it is token 23"),
        ("added_tokens.json", {"<new>": "23"}, "is damaged: the token '<new>' has the number '23'"),
        ("tokenizer_config.json", {"padding_side": "left"}, "padding_side is 'left', but short examples are padded"),
        (
            "tokenizer_config.json",
            {"model_max_length": 7},
            "max_length is 8, but the tokenizer's model_max_length is 7",
        ),
        ("tokenizer_config.json", {"model_max_length": "7"}, "model_max_length is '7', but must be a positive number"),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizr"}, "tokenizer_class is 'BertTokenizr'; known are"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [1]}}, "auto_map is not supported"),
        (
            "special_tokens_map.json",
            {"vocab_file": "/etc/passwd"},
            "special_tokens_map.json: vocab_file is not supported",
        ),
        ("tokenizer_config.json", {"sep_token": None}, "sep_token is None, but must be a token"),
        ("special_tokens_map.json", {"cls_token": "<none>"}, "lacks the special tokens <none>"),
        ("config.json", {"model_type": "t5"}, "says model_type = 't5'"),
        ("config.json", {"model_type": "bert", "tokenizer_class": "X"}, "says tokenizer_class = 'X': say that in"),
    ],
)
def test_settings_beside_a_vocabulary_are_followed_or_refused(bert, file, values, expected):
    (bert / file).write_text(json.dumps(values))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            tokens(bert)
    else:
        assert tokens(bert) == expected
        if file != "config.json":
            assert bert / file in load_tokenizer(bert).files


def test_too_long_sentences_lose_their_start(bert):
    (bert / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    assert tokens(bert, "it it it rain rain and and pour .") == [2, 10, 10, 14, 14, 12, 15, 3]


def test_a_token_for_masks_that_the_vocabulary_lacks_is_refused_in_texts(bert, tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "<blank>"}')
    assert load_tokenizer(bert).vocab_size == len(WORDS)
    assert tokens(bert) == [2, 5, 7, 18, 17, 19, 12, 3]
    with pytest.raises(UserError, match="example 0 holds <blank>, a special token that the vocabulary"):
        tokens(bert, "it <blank>")


@pytest.mark.parametrize("bert", ["tokenizer.json"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree["normalizer"].update(lowercase=False),
            "says lowercase = false, .* write do_lower_case into",
        ),
        (lambda tree: tree.update(normalizer={"type": "NFC"}), "has the normalizer .*NFC.*say tokenizer_class"),
        (lambda tree: tree.update(post_processor=None), "has a post_processor that puts other special tokens"),
    ],
)
def test_a_tokenizer_json_that_transformers_would_ignore_is_refused(bert, change, message):
    tree = json.loads((bert / "tokenizer.json").read_text())
    change(tree)
    (bert / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        load_tokenizer(bert)


def ours(folder, texts):
    tokenizer = load_tokenizer(folder)
    source = tokenizer.encode(TextSource(texts, np.zeros(len(texts), int)), LENGTH)
    (batch,) = text_eval_batches(source, batch_size=len(texts), lengths=(LENGTH,))
    return batch["tokens"].tolist(), batch["token_mask"].astype(int).tolist(), batch["token_types"].tolist()


def theirs(folder, texts):
    transformers = pytest.importorskip("transformers", reason=REASON)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(
        *columns, truncation="longest_first", max_length=LENGTH, padding="max_length", return_token_type_ids=True
    )
    return encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"]


@pytest.mark.parametrize("seeds", fast([range(60), range(60, 1000)]))
def test_random_settings_give_the_tokens_of_transformers_or_are_refused(seeds, byte_pairs, tmp_path):
    pytest.importorskip("transformers", reason=REASON)
    wrong, counts = {}, collections.Counter()
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        kind = write_folder(folder, np.random.default_rng(seed), byte_pairs)
        for texts in ([(text,) for text in TEXTS], [(first, second) for first in TEXTS for second in TEXTS]):
            try:
                found = ours(folder, texts)
            except UserError as error:
                found = str(error)
            counts[kind, "refused" if isinstance(found, str) else "equal"] += 1
            if isinstance(found, str):
                continue
            try:
                expected = theirs(folder, texts)
            except Exception as error:
                expected = repr(error)
            if found != expected:
                wrong[seed] = (found, expected)
    assert not wrong
    assert all(counts[kind, "equal"] > 0.2 * counts[kind, "refused"] for kind, _ in [*counts])
