"""Read the tokenizers of BERT and RoBERTa from the files beside a model's weights, and encode text.

The library `tokenizers` encodes the text. It is configured as in `transformers`, so the tokens are the same.
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
        """The number of tokens of each example."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, which converts sentences to tokens. `load_tokenizer` reads it from a folder.

    Attributes:
        pad_token: The token with which short examples are padded.
        files: The paths of the files that the tokenizer was read from. A copy of these files gives the same tokenizer.
    """

    pad_token: int
    files: tuple[Path, ...]
    _library: tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        """The largest token plus one, which is the number of embeddings that a model needs at least."""
        return max(self._library.get_vocab().values()) + 1

    def encode(self, source: TextSource, max_length: int) -> TokenSource:
        """Return the tokens of all examples, with the special tokens around them.

        Args:
            source: The sentences, or pairs of sentences.
            max_length: The largest number of tokens in an example, including special tokens. If an example is too long,
                tokens at the end of its sentence are dropped. If a pair is too long, tokens at the end of the longer
                sentence are dropped until the pair is short enough.

        Raises:
            UserError: `max_length` is below 8, which leaves too few tokens for the text beside the special tokens.
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
    """Read the tokenizer of a BERT or RoBERTa model from a folder of `transformers`.

    The tokenizer is read from the first of these files that the folder has:

    - `tokenizer.json`, whose settings for padding and truncation are ignored;
    - `vocab.txt`, which holds the word pieces of BERT;
    - `vocab.json` and `merges.txt`, which hold the byte pairs of RoBERTa.

    If there is no `tokenizer.json`, further settings are read from `tokenizer_config.json`, if that file exists.

    Args:
        folder: The path of the folder.

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
    """Read a `tokenizer.json`, and disable its padding and truncation."""
    read_json(path, _MOST_BYTES)
    library = _parse(path, tokenizers.Tokenizer.from_file, str(path))
    library.no_padding()
    library.no_truncation()
    # If the file names a special token that is not in its vocabulary, the threads of the library panic when they encode
    # the first text. To detect this now, encode a sentence and a pair.
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
    """Return `read(*arguments)`, which reads the file at `path`.

    Raises:
        UserError: `read` raised an error of any kind, which means that the file is damaged.
    """
    try:
        return read(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # The library has no class of its own for errors, and panics are no `Exception`s.
        raise UserError(f"{path} is damaged: {error}. Copy it again from where the model came from") from error


def _check_special_tokens(path: Path, vocabulary: dict[str, int], tokens: tuple[str, ...]) -> None:
    if missing := [token for token in tokens if token not in vocabulary]:
        raise UserError(f"{path} lacks the special tokens {' '.join(missing)}; it needs {' '.join(tokens)}")
