"""Read the tokenizers of models that continue text, as transformers does: Llama, Mistral, Qwen and Gemma.

The files are `tokenizer.json`, the files of settings (`surm_jax.data.text.settings`) and `chat_template.jinja`. The
classes `LlamaTokenizer`, `Qwen2Tokenizer` and `GemmaTokenizer` of transformers take only the vocabulary, the merges and
the post-processor from `tokenizer.json`, and split text in their own way. All other classes take the whole file. The
settings `add_bos_token` and `add_eos_token` have no effect beside a `tokenizer.json`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from surm_jax.data.lm.chat import ChatTemplate
from surm_jax.data.text.settings import (
    BERT,
    GEMMA,
    QWEN2,
    ROBERTA,
    SETTINGS_NAMES,
    TOKENIZER_NAME,
    WHOLE,
    Settings,
    read_settings,
)
from surm_jax.data.text.tokenizer import parse, read_whole, try_out
from surm_jax.errors import UserError

TEMPLATE_NAME = "chat_template.jinja"
_MOST_BYTES_OF_TEMPLATE = 2**20
# How Qwen2Tokenizer divides text into words.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer for a model that continues text.

    Attributes:
        vocab_size: The largest token plus one, which is the number of embeddings that a model needs at least.
        start: The tokens that the tokenizer puts before a text, such as `<s>`. It may be empty.
        end: The token that ends a text, or None if the settings name none.
        special: The tokens that stand for no text, such as `<s>`.
        template: The template of chats, or None if the folder has none.
        files: The files that the tokenizer was read from.
    """

    vocab_size: int
    start: tuple[int, ...]
    end: int | None
    special: frozenset[int]
    template: ChatTemplate | None
    files: tuple[Path, ...]
    _library: tokenizers.Tokenizer

    def encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Return the tokens of each text, without `start` and `end`, and the character span of each token."""
        return self._library.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without the special tokens."""
        return self._library.decode(list(tokens), skip_special_tokens=True)

    def decode_after(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text that tokens add to the tokens before them, such as those of a prompt.

        At the beginning of a text, a tokenizer may drop a space. So the text of `tokens` differs after other tokens.
        """
        shown = self.decode(before)
        whole = self.decode([*before, *tokens])
        return whole[len(shown) :] if whole.startswith(shown) else self.decode(tokens)


def load_prompt_tokenizer(folder: str | os.PathLike[str]) -> PromptTokenizer:
    """Read the tokenizer in a folder of transformers.

    Raises:
        UserError: The folder has no `tokenizer.json`, the tokenizer is of another kind of model, a file is damaged, or
            a setting cannot be followed.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER_NAME}: save the tokenizer there with transformers")
    library, tree = read_whole(path)
    settings = read_settings(folder, tree)
    if settings.kind in (BERT, ROBERTA):
        raise UserError(f"{folder} has a {settings.kind}, which is of a model that classifies text and continues none")
    if settings.kind != WHOLE:
        library = parse(path, _rebuilt, path, settings, library, tree)
    library.encode_special_tokens = settings.switch("split_special_tokens", False)
    parse(path, settings.add_tokens, library)
    vocabulary = library.get_vocab()
    try_out(path, library)
    lacking = {settings.content("mask_token")} - settings.contents - library.get_vocab(with_added_tokens=False).keys()
    encoding = library.encode("a")
    inner = parse(path, encoding.special_tokens_mask.index, 0)
    template = _template(folder, settings)
    files = (TOKENIZER_NAME, *SETTINGS_NAMES, TEMPLATE_NAME)
    return PromptTokenizer(
        vocab_size=max(number for token, number in vocabulary.items() if token not in lacking) + 1,
        start=tuple(encoding.ids[:inner]),
        end=vocabulary.get(settings.content("eos_token")),
        special=frozenset(number for number, token in library.get_added_tokens_decoder().items() if token.special),
        template=template,
        files=tuple(folder / name for name in files if (folder / name).is_file()),
        _library=library,
    )


def _rebuilt(
    path: Path, settings: Settings, whole: tokenizers.Tokenizer, tree: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """Build the tokenizer that transformers would build from the vocabulary in a `tokenizer.json`."""
    if not isinstance(whole.model, models.BPE):
        raise UserError(f"{path} holds a {type(whole.model).__name__}, but a {settings.kind} needs a BPE")
    vocabulary = tree["model"]["vocab"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in tree["model"]["merges"]]
    prefix = settings.switch("add_prefix_space", None)
    if settings.kind == QWEN2:
        library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        library.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        library.decoder = decoders.ByteLevel()
    else:
        unknown = {"unk_token": settings.content("unk_token")} if settings.kind == GEMMA else {}
        library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True, **unknown))
        if settings.kind == GEMMA:
            library.normalizer = normalizers.Replace(" ", "▁")
            library.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        else:
            scheme = "always" if settings.switch("legacy", False) else "first"
            scheme = "never" if prefix is False else scheme
            library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        first = [] if settings.kind == GEMMA or prefix is False else [decoders.Strip(content=" ", left=1)]
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        library.decoder = decoders.Sequence([*pieces, *first])
    library.post_processor = whole.post_processor
    return library


def _template(folder: Path, settings: Settings) -> ChatTemplate | None:
    path, said = folder / TEMPLATE_NAME, settings.values.get("chat_template")
    where = folder / SETTINGS_NAMES[0]
    if path.is_file():
        where = path
        try:
            said = path.read_bytes()[:_MOST_BYTES_OF_TEMPLATE].decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    elif isinstance(said, list):
        said = {each.get("name"): each.get("template") for each in said if isinstance(each, dict)}.get("default")
    if said is None:
        return None
    if not isinstance(said, str):
        raise settings.refusal("chat_template", "must be text")
    names = {name: settings.content(name) for name in settings.special if settings.content(name)}
    return ChatTemplate(said, names, str(where))
