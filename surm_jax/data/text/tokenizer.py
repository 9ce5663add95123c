"""The tokenizers of BERT and RoBERTa, read from the files beside a model's weights.

The library `tokenizers` does the work. It is set up as `transformers` sets it up, so the tokens are the same.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Float, Int
from tokenizers import models, normalizers, pre_tokenizers, processors

from surm_jax.data.text.dataset import TextSource
from surm_jax.errors import UserError
from surm_jax.files import read_json

TOKENIZER_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
WORD_PIECES_NAME = "vocab.txt"
BYTE_PAIRS_NAMES = ("vocab.json", "merges.txt")
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_ROBERTA_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
_SHORTEST = 8
_LARGEST_TOKEN = 2**24
_MOST_BYTES = 2**28
_TRIAL = "a \uffff"
# Number of examples that are encoded at once. The results of the library are large, so not all are kept at once.
_CHUNK = 1024


@dataclass(frozen=True)
class TokenSource:
    """Tokenised examples of different lengths, in memory.

    Attributes:
        tokens: The tokens of all examples, one after the other.
        token_types: For each token 0, or 1 if it belongs to the second sentence and the model distinguishes them.
        offsets: The starts of the examples: example `i` is `tokens[offsets[i] : offsets[i + 1]]`.
        labels: The label of each example, int64 classes or float32 scores.
        pad_token: The token that fills up short examples.
    """

    tokens: Int[np.ndarray, "total"]
    token_types: Int[np.ndarray, "total"]
    offsets: Int[np.ndarray, "n+1"]
    labels: Int[np.ndarray, "n"] | Float[np.ndarray, "n"]
    pad_token: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Number of tokens of each example."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that `load_tokenizer` has read.

    Attributes:
        pad_token: The token that fills up short examples.
        files: The files that it was read from. Another program needs them to read the same tokenizer.
    """

    pad_token: int
    files: tuple[Path, ...]
    _library: tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        """The largest token plus one."""
        return max(self._library.get_vocab().values()) + 1

    def encode(self, source: TextSource, max_length: int) -> TokenSource:
        """Return the tokens of all examples, with the special tokens around them.

        Args:
            source: Sentences, or pairs of them.
            max_length: Largest number of tokens of an example, including special tokens. If a pair is too long, tokens
                are dropped at the end of its longer sentence until it fits.

        Raises:
            UserError: `max_length` is below 8, which leaves too little room for tokens that are not special.
        """
        if max_length < _SHORTEST:
            raise UserError(f"max_length is {max_length}, but must be at least {_SHORTEST}")
        self._library.enable_truncation(max_length, strategy="longest_first")
        tokens, types = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        offsets = np.zeros(len(source) + 1, np.int64)
        for start in range(0, len(source), _CHUNK):
            sentences = source.sentences[start : start + _CHUNK]
            texts = [pair if len(pair) == 2 else pair[0] for pair in sentences]
            for index, encoding in enumerate(self._library.encode_batch_fast(texts), start):
                tokens.append(np.array(encoding.ids, np.int32))
                types.append(np.array(encoding.type_ids, np.int32))
                offsets[index + 1] = offsets[index] + len(tokens[-1])
        return TokenSource(np.concatenate(tokens), np.concatenate(types), offsets, source.labels, self.pad_token)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a model.

    Args:
        folder: A folder of `transformers`. The first of these files is read: `tokenizer.json`; `vocab.txt`, the word
            pieces of BERT; `vocab.json` and `merges.txt`, the byte pairs of RoBERTa. For the last two,
            `tokenizer_config.json` gives further settings if it is there. Lengths for padding and truncation in
            `tokenizer.json` are ignored.

    Raises:
        UserError: The folder has none of these files, a file is damaged, or special tokens are missing.
    """
    folder = Path(folder)
    if (folder / TOKENIZER_NAME).is_file():
        names: tuple[str, ...] = (TOKENIZER_NAME,)
        library = _whole(folder / TOKENIZER_NAME)
    elif (folder / WORD_PIECES_NAME).is_file():
        names = (WORD_PIECES_NAME,)
        library = _word_pieces(folder)
    elif all((folder / name).is_file() for name in BYTE_PAIRS_NAMES):
        names = BYTE_PAIRS_NAMES
        library = _byte_pairs(folder)
    else:
        raise UserError(
            f"{folder} has no tokenizer: expected {TOKENIZER_NAME}, or {WORD_PIECES_NAME} (BERT), or "
            f"{' and '.join(BYTE_PAIRS_NAMES)} (RoBERTa), as they lie beside the model's weights"
        )
    vocabulary = library.get_vocab()
    known = [tokens for tokens in (_BERT_TOKENS, _ROBERTA_TOKENS) if vocabulary.keys() >= set(tokens)]
    if not known or not library.num_special_tokens_to_add(is_pair=True):
        raise UserError(
            f"{folder} has the tokenizer of another model: expected one that puts special tokens around sentences and "
            f"knows {' '.join(_BERT_TOKENS)} (BERT) or {' '.join(_ROBERTA_TOKENS)} (RoBERTa)"
        )
    if (largest := max(vocabulary.values())) > _LARGEST_TOKEN:
        raise UserError(f"{folder} has a tokenizer with the token {largest}; tokens are at most {_LARGEST_TOKEN}")
    files = tuple(folder / name for name in (*names, CONFIG_NAME) if (folder / name).is_file())
    return Tokenizer(vocabulary[known[0][0]], files, library)


def _whole(path: Path) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`, and switch off its padding and truncation."""
    read_json(path, _MOST_BYTES)
    library = _parse(path, tokenizers.Tokenizer.from_file, str(path))
    library.no_padding()
    library.no_truncation()
    # If the file names a special token that is not in its vocabulary, the threads of the library panic at the first
    # text. To find this out early, encode a sentence and a pair.
    for texts in ([_TRIAL], [_TRIAL, _TRIAL]):
        if not {*_parse(path, library.encode, *texts).type_ids} <= {0, 1}:
            raise UserError(f"{path} is damaged: the types of tokens must be 0 and 1")
    return library


def _word_pieces(folder: Path) -> tokenizers.Tokenizer:
    path = folder / WORD_PIECES_NAME
    text = _parse(path, path.read_text, "utf-8")
    vocabulary = {line: index for index, line in enumerate(text.removesuffix("\n").split("\n"))}
    _check_special_tokens(path, vocabulary, _BERT_TOKENS)
    config = _config(folder)
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_setting(folder, config, "tokenize_chinese_chars", True),
        strip_accents=_setting(folder, config, "strip_accents", None),
        lowercase=_setting(folder, config, "do_lower_case", True),
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    library.add_special_tokens([token for token in (*_BERT_TOKENS, "[MASK]") if token in vocabulary])
    return library


def _byte_pairs(folder: Path) -> tokenizers.Tokenizer:
    vocabulary_path, merges_path = (folder / name for name in BYTE_PAIRS_NAMES)
    vocabulary = read_json(vocabulary_path, _MOST_BYTES)
    _check_special_tokens(vocabulary_path, vocabulary, _ROBERTA_TOKENS)
    model = _parse(merges_path, models.BPE.from_file, str(vocabulary_path), str(merges_path))
    prefix = _setting(folder, _config(folder), "add_prefix_space", False)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.post_processor = processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), trim_offsets=True, add_prefix_space=prefix
    )
    library.add_special_tokens([token for token in (*_ROBERTA_TOKENS, "<mask>") if token in vocabulary])
    return library


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return read_json(path) if path.is_file() else {}


def _setting(folder: Path, config: dict[str, Any], key: str, default: bool | None) -> Any:
    value = config.get(key, default)
    if value is not default and not isinstance(value, bool):
        raise UserError(f"{folder / CONFIG_NAME}: {key} is {value!r}, but must be true or false")
    return value


def _parse(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """Return `read(*arguments)`; any error means that the file is damaged."""
    try:
        return read(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # The library has no own class of errors, and its panics are not `Exception`s.
        raise UserError(f"{path} is damaged: {error}. Copy it again from where the model came from") from error


def _check_special_tokens(path: Path, vocabulary: dict[str, int], tokens: tuple[str, ...]) -> None:
    if missing := [token for token in tokens if token not in vocabulary]:
        raise UserError(f"{path} lacks the special tokens {' '.join(missing)}; it needs {' '.join(tokens)}")
