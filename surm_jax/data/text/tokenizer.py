"""Read the tokenizers of BERT and RoBERTa from a folder with a model's weights, and encode text.

The library `tokenizers` encodes the text. It is configured as in `transformers`, so the tokens are the same.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Float, Int
from tokenizers import models, normalizers, pre_tokenizers, processors

from surm_jax.data.text.dataset import TextSource, checked_labels
from surm_jax.data.text.settings import (
    BERT,
    DECODERS,
    ROBERTA,
    SETTINGS_NAMES,
    TOKENIZER_NAME,
    VOCABULARY_NAMES,
    WHOLE,
    Settings,
    read_settings,
)
from surm_jax.errors import UserError
from surm_jax.files import read_json

_NEEDED = ("pad_token", "unk_token", "cls_token", "sep_token")
# The settings that change a part of the tokenizer, by the name of the change in `tokenizer.json`.
_SETTING_OF = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
    "add_prefix_space": "add_prefix_space",
}
_OTHER_VOCABULARIES = r"tekken\.json|tokenizer\.model|tiktoken\.model"
_SHORTEST = 8
_LARGEST_TOKEN = 2**24
_MOST_BYTES = 2**28
_TRIAL = "a \uffff"
# The number of examples that are encoded at once. The library's result objects need much memory, so those of one chunk
# are released before the next chunk is encoded.
_CHUNK = 1024


@dataclass(frozen=True)
class TokenSource:
    """Tokenised examples in memory, which may have different lengths.

    Attributes:
        tokens: The tokens of all examples, concatenated.
        token_types: The type of each token. It is 1 if the token belongs to the second sentence of a pair and the model
            distinguishes the sentences, and otherwise 0.
        offsets: The indices in `tokens` at which the examples start. Example `i` is
            `tokens[offsets[i] : offsets[i + 1]]`.
        labels: The label of each example, as int64 classes or float32 scores.
        pad_token: The token with which short examples are padded.

    Raises:
        UserError: The arrays do not fit together, or a number of a token or a label is out of range.
    """

    tokens: Int[np.ndarray, "total"]
    token_types: Int[np.ndarray, "total"]
    offsets: Int[np.ndarray, "n+1"]
    labels: Int[np.ndarray, "n"] | Float[np.ndarray, "n"]
    pad_token: int

    def __post_init__(self):
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.offsets) - 1))
        starts, total = self.offsets, len(self.tokens)
        if self.token_types.shape != (total,) or starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
            raise UserError(
                f"{total} tokens, token types of shape {self.token_types.shape} and offsets from {starts[0]} to"
                f" {starts[-1]} do not fit together: expected as many types as tokens, and rising offsets"
            )
        for name, numbers in {"tokens": self.tokens, "token_types": self.token_types}.items():
            if numbers.dtype.kind not in "iu" or (total and not 0 <= numbers.min() <= numbers.max() < 2**31):
                raise UserError(f"{name} must be integers from 0 to 2^31 - 1")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """The number of tokens of each example."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, which converts sentences to tokens. `load_tokenizer` reads it from a folder.

    Attributes:
        pad_token: The token with which short examples are padded.
        vocab_size: The largest token plus one, which is the number of embeddings that a model needs at least.
        longest: The largest number of tokens that an example may have, or None if the settings do not limit it.
        truncation_side: The side on which the tokens of too long examples are dropped.
        files: The paths of the files that the tokenizer was read from. A copy of these files gives the same tokenizer.
    """

    pad_token: int
    vocab_size: int
    longest: int | None
    truncation_side: Literal["left", "right"]
    files: tuple[Path, ...]
    _library: tokenizers.Tokenizer

    def encode(self, source: TextSource, max_length: int) -> TokenSource:
        """Return the tokens of all examples, with the special tokens around them.

        Args:
            source: The sentences, or pairs of sentences.
            max_length: The largest number of tokens in an example, including special tokens. If an example is too long,
                tokens at the end of its sentence are dropped (or at its start, see `truncation_side`). If a pair is too
                long, tokens of the longer sentence are dropped until the pair is short enough.

        Raises:
            UserError: `max_length` is below 8, which leaves too few tokens for the text beside the special tokens, or
                above `longest`. Or an example holds a special token that the vocabulary lacks.
        """
        if max_length < _SHORTEST:
            raise UserError(f"max_length is {max_length}, but must be at least {_SHORTEST}")
        if self.longest is not None and max_length > self.longest:
            raise UserError(f"max_length is {max_length}, but the tokenizer's model_max_length is {self.longest}")
        self._library.enable_truncation(max_length, strategy="longest_first", direction=self.truncation_side)
        tokens, types = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        offsets = np.zeros(len(source) + 1, np.int64)
        for start in range(0, len(source), _CHUNK):
            sentences = source.sentences[start : start + _CHUNK]
            texts = [pair if len(pair) == 2 else pair[0] for pair in sentences]
            for index, encoding in enumerate(self._library.encode_batch_fast(texts), start):
                tokens.append(np.array(encoding.ids, np.int32))
                types.append(np.array(encoding.type_ids, np.int32))
                offsets[index + 1] = offsets[index] + len(tokens[-1])
        joined = np.concatenate(tokens)
        if (unknown := np.flatnonzero(joined >= self.vocab_size)).size:
            example = np.searchsorted(offsets, unknown[0], side="right") - 1
            token = self._library.id_to_token(int(joined[unknown[0]]))
            raise UserError(f"example {example} holds {token}, a special token that the vocabulary of the model lacks")
        return TokenSource(joined, np.concatenate(types), offsets, source.labels, self.pad_token)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a BERT or RoBERTa model from a folder of `transformers`.

    The vocabulary is read from the first of these files that the folder has:

    - `tokenizer.json`;
    - `vocab.txt`, which holds the word pieces of BERT;
    - `vocab.json` and `merges.txt`, which hold the byte pairs of RoBERTa.

    The settings in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` are followed as in
    transformers 5. They count more than those in `tokenizer.json`, unless `tokenizer_class` is
    "PreTrainedTokenizerFast". A `tokenizer.json` that disagrees with a default of transformers is refused.

    Args:
        folder: The path of the folder.

    Raises:
        UserError: The folder has no vocabulary, a file is damaged, a setting cannot be followed, or special tokens are
            missing.
    """
    folder = Path(folder)
    names: tuple[str, ...] = (TOKENIZER_NAME,)
    whole, tree = read_whole(folder / TOKENIZER_NAME) if (folder / TOKENIZER_NAME).is_file() else (None, None)
    settings = read_settings(folder, tree)
    if settings.kind in DECODERS:
        raise UserError(f"{folder} has a {settings.kind}, which is of a model that continues text and classifies none")
    if whole is None:
        names = _vocabulary_names(folder, settings.kind)
    library = _configured(folder / names[0], settings, whole, tree)
    if settings.side("padding_side", _direction(tree, "padding")) == "left":
        raise settings.refusal("padding_side", "short examples are padded on the right: set it to 'right'")
    vocabulary = library.get_vocab()
    pad = settings.content("pad_token")
    if not pad or not library.num_special_tokens_to_add(is_pair=True):
        raise UserError(
            f"{folder} has the tokenizer of another model: expected one that puts special tokens around sentences and "
            "has a pad_token, as those of BERT and RoBERTa"
        )
    # transformers adds the token for masks to a vocabulary that lacks it, but the model has no embedding for it.
    lacking = {settings.content("mask_token")} - settings.contents - library.get_vocab(with_added_tokens=False).keys()
    largest = max(number for token, number in vocabulary.items() if token not in lacking)
    return Tokenizer(
        pad_token=vocabulary[pad],
        vocab_size=largest + 1,
        longest=settings.max_length(),
        truncation_side=settings.side("truncation_side", _direction(tree, "truncation")),
        files=tuple(folder / name for name in (*names, *SETTINGS_NAMES) if (folder / name).is_file()),
        _library=library,
    )


def _vocabulary_names(folder: Path, kind: str) -> tuple[str, ...]:
    """Return the names of the files that hold the vocabulary in a folder without `tokenizer.json`."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not any(present.issuperset(names) for names in VOCABULARY_NAMES.values()):
        raise UserError(
            f"{folder} has no tokenizer: expected {TOKENIZER_NAME}, or vocab.txt (BERT), or vocab.json and merges.txt "
            "(RoBERTa), as they lie beside the model's weights"
        )
    names = VOCABULARY_NAMES.get(kind, (TOKENIZER_NAME,))
    if not present.issuperset(names):
        raise UserError(
            f"{folder} has no {' and '.join(names)}, which a {kind} is read from: say the right tokenizer_class in "
            f"{SETTINGS_NAMES[0]}, such as {', '.join(VOCABULARY_NAMES)}"
        )
    if other := sorted(name for name in present if re.match(_OTHER_VOCABULARIES, name)):
        raise UserError(
            f"{folder} holds {other[0]}, which transformers reads instead of {names[0]}: remove one of them"
        )
    return names


def read_whole(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Read a `tokenizer.json`. Return the tokenizer, without padding and truncation, and the content of the file."""
    tree = read_json(path, _MOST_BYTES)
    library = parse(path, tokenizers.Tokenizer.from_file, str(path))
    _require_small(path, library.get_vocab())
    library.no_padding()
    library.no_truncation()
    try_out(path, library)
    return library, tree


def _require_small(path: Path, vocabulary: Mapping[str, int]) -> None:
    """Check that token numbers are small, because the library goes through all numbers up to them when it writes."""
    largest = max(vocabulary.values(), default=0)
    if largest > _LARGEST_TOKEN:
        raise UserError(f"{path} has the token {largest}; tokens are at most {_LARGEST_TOKEN}")


def _direction(tree: Mapping[str, Any] | None, name: str) -> str:
    """Return the side at which a `tokenizer.json` pads or truncates, or "right" if it does not say."""
    return ((tree or {}).get(name) or {}).get("direction", "Right").lower()


def _configured(
    path: Path, settings: Settings, whole: tokenizers.Tokenizer | None, tree: Mapping[str, Any] | None
) -> tokenizers.Tokenizer:
    """Build the tokenizer that transformers would build from a vocabulary and settings.

    Args:
        path: The file of the vocabulary.
        settings: The settings.
        whole: The tokenizer in `tokenizer.json`, if that is the file of the vocabulary.
        tree: The content of this file.
    """
    if settings.kind == WHOLE and whole is not None:
        library = whole
    else:
        library = (_word_pieces if settings.kind == BERT else _byte_pairs)(path, settings, whole, tree)
    library.encode_special_tokens = settings.switch("split_special_tokens", False)
    parse(path, settings.add_tokens, library)
    if settings.kind != WHOLE:
        library.post_processor = parse(path, _post_processor, settings, library)
        if whole is not None:
            _require_agreement(path, settings, whole, library)
    try_out(path, library)
    return library


def _word_pieces(
    path: Path, settings: Settings, whole: tokenizers.Tokenizer | None, tree: Mapping[str, Any] | None
) -> tokenizers.Tokenizer:
    del tree
    if whole is None:
        vocabulary = parse(path, models.WordPiece.read_file, str(path))
    else:
        _require_model(path, settings, whole, models.WordPiece)
        vocabulary = whole.get_vocab(with_added_tokens=False)
    _require_special_tokens(path, settings, vocabulary)
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=settings.content("unk_token")))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.switch("tokenize_chinese_chars", True),
        strip_accents=settings.switch("strip_accents", None),
        lowercase=settings.switch("do_lower_case", True),
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return library


def _byte_pairs(
    path: Path, settings: Settings, whole: tokenizers.Tokenizer | None, tree: Mapping[str, Any] | None
) -> tokenizers.Tokenizer:
    merges_path = path
    if whole is None or tree is None:
        merges_path = path.parent / VOCABULARY_NAMES[ROBERTA][1]
        read_json(path, _MOST_BYTES)
        vocabulary, merges = parse(merges_path, models.BPE.read_file, str(path), str(merges_path))
        _require_small(path, vocabulary)
    else:
        _require_model(path, settings, whole, models.BPE)
        vocabulary = whole.get_vocab(with_added_tokens=False)
        pairs = tree["model"]["merges"]
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
    _require_special_tokens(path, settings, vocabulary)
    model = parse(merges_path, models.BPE, vocabulary, merges)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.switch("add_prefix_space", False))
    return library


def _post_processor(settings: Settings, library: tokenizers.Tokenizer) -> processors.PostProcessor:
    """Return the part of a tokenizer that puts the special tokens of BERT or RoBERTa around sentences."""
    start, end = settings.content("cls_token"), settings.content("sep_token")
    vocabulary = library.get_vocab()
    numbers = [(token, vocabulary[token]) for token in (start, end)]
    if settings.kind == BERT:
        return processors.TemplateProcessing(
            single=f"{start}:0 $A:0 {end}:0",
            pair=f"{start}:0 $A:0 {end}:0 $B:1 {end}:1",
            special_tokens=numbers,
        )
    trim, prefix = settings.switch("trim_offsets", True), settings.switch("add_prefix_space", False)
    return processors.RobertaProcessing(numbers[1], numbers[0], trim, prefix)


def _require_model(path: Path, settings: Settings, whole: tokenizers.Tokenizer, model: type) -> None:
    if not isinstance(whole.model, model):
        raise UserError(
            f"{path} holds a {type(whole.model).__name__}, but the tokenizer is a {settings.kind}, which needs a "
            f"{model.__name__}"
        )


def _require_special_tokens(path: Path, settings: Settings, vocabulary: Mapping[str, int]) -> None:
    for name in _NEEDED:
        if not settings.content(name):
            raise settings.refusal(name, "must be a token")
    needed = [settings.content(name) for name in _NEEDED]
    if missing := [token for token in needed if token not in vocabulary and token not in settings.contents]:
        raise UserError(f"{path} lacks the special tokens {' '.join(missing)}; it needs {' '.join(needed)}")


def _require_agreement(
    path: Path, settings: Settings, whole: tokenizers.Tokenizer, library: tokenizers.Tokenizer
) -> None:
    """Check that a `tokenizer.json` gives the tokens that transformers gives for the same folder.

    transformers replaces parts of `tokenizer.json` by defaults of its own. They must agree with the replaced parts.

    Parts for which the settings of the tokeniser give a value are not checked.

    Raises:
        UserError: They disagree.
    """
    ignored = f"which a {settings.kind} of transformers ignores: say tokenizer_class = {WHOLE}, or remove it"
    said, made = (json.loads(one.to_str()) for one in (whole, library))
    for part in ("normalizer", "pre_tokenizer"):
        says, takes = said[part] or {}, made[part] or {}
        for key in sorted(says.keys() | takes.keys()):
            name = _SETTING_OF.get(key)
            if says.get(key) == takes.get(key) or key == "trim_offsets" or name in settings.values:
                continue
            if name is None:
                raise UserError(f"{path} has the {part} {says or None}, {ignored}")
            raise UserError(
                f"{path} says {key} = {json.dumps(says.get(key))}, but {SETTINGS_NAMES[0]} does not say {name}, and "
                f"transformers takes {json.dumps(takes.get(key))}: write {name} into {SETTINGS_NAMES[0]}"
            )
    one = library.encode("a", add_special_tokens=False)
    around = []
    for processor in (whole.post_processor, library.post_processor):
        encoding = parse(path, processor.process, one, one) if processor else one
        around.append((encoding.ids, encoding.type_ids))
    if around[0] != around[1]:
        raise UserError(f"{path} has a post_processor that puts other special tokens around sentences, {ignored}")


def try_out(path: Path, library: tokenizers.Tokenizer) -> None:
    """Encode a sentence and a pair, to find out whether the tokenizer works.

    The threads of the library panic at the first text if a file names a special token that is not in its vocabulary.
    """
    for texts in ([_TRIAL], [_TRIAL, _TRIAL]):
        if not {*parse(path, library.encode, *texts).type_ids} <= {0, 1}:
            raise UserError(f"{path} is damaged: the types of tokens must be 0 and 1")


def parse(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """Call `read(*arguments)` to read the file at `path`, and return its result.

    Raises:
        UserError: `read` raised an error of any kind, which means that the file is damaged.
    """
    try:
        return read(*arguments)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # The library has no class of its own for errors, and panics are no `Exception`s.
        raise UserError(f"{path} is damaged: {error}. Copy it again from where the model came from") from error
