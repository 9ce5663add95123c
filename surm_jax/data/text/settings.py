"""Read the settings of a tokenizer from its files, as transformers 5 reads them.

The files are `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`. The rules are those of
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` in transformers. A setting that would change
the tokens in a way that is not supported here is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAMES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""The names of the files of settings. A folder may lack some or all of them."""

BERT, ROBERTA, WHOLE = "BertTokenizer", "RobertaTokenizer", "PreTrainedTokenizerFast"
LLAMA, GEMMA, QWEN2 = DECODERS = "LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer"
"""The classes of transformers: `WHOLE` uses all of a `tokenizer.json`, all others only the vocabulary and the merges.

`DECODERS` are the classes for models that continue text.
"""

VOCABULARY_NAMES: Mapping[str, tuple[str, ...]] = {BERT: ("vocab.txt",), ROBERTA: ("vocab.json", "merges.txt")}
"""The names of the files that hold the vocabulary of a class, in a folder without `tokenizer.json`."""

_CLASSES = {
    **{kind: kind for kind in (BERT, ROBERTA, *DECODERS)},
    **dict.fromkeys(("PreTrainedTokenizer", "TokenizersBackend"), WHOLE),
}
_CLASS_OF_MODELS = {
    **{"bert": BERT, "roberta": ROBERTA, "llama": WHOLE, "mistral": WHOLE, "qwen2": QWEN2, "qwen3": QWEN2},
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
}
# transformers reads the tokenizer of these models as the class above, whatever tokenizer_class says.
_SETTLED = ("mistral", "qwen2")
_CLASS_OF_VOCABULARIES = {"WordPiece": BERT, "BPE": ROBERTA}
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    BERT: {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    ROBERTA: {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
    LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    GEMMA: {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    QWEN2: {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    WHOLE: {},
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FIELDS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
_EXTRA = "extra_special_tokens"
# transformers would pass these settings on to the code of a repository, or read the tokenizer from elsewhere.
_REFUSED = (
    *("auto_map", "fast_tokenizer_files", "gguf_file", "init_inputs", "merges", "post_processor", "tokenizer_object"),
    *("tokenizer_padding", "tokenizer_truncation", "vocab"),
)
_FILES = ("merges_file", "tokenizer_file", "vocab_file")


@dataclass(frozen=True)
class Settings:
    """The settings of a tokenizer.

    Attributes:
        folder: The folder that the settings were read from.
        kind: The class of transformers: `BERT`, `ROBERTA`, `WHOLE` or one of `DECODERS`.
        values: All settings by name.
        special: The special tokens by name, such as "pad_token". The value is None if there is no such token.
        extra: Further special tokens, which have no name.
        added: The tokens that the files add to the vocabulary, by number.
    """

    folder: Path
    kind: str
    values: Mapping[str, Any]
    special: Mapping[str, str | AddedToken | None]
    extra: tuple[str | AddedToken, ...]
    added: Mapping[int, AddedToken]

    @property
    def contents(self) -> set[str]:
        """The texts of the tokens that the files add to the vocabulary."""
        return {_content(token) for token in self.added.values()}

    def content(self, name: str) -> str:
        """Return the text of a special token, or "" if there is no such token."""
        token = self.special[name]
        return "" if token is None else _content(token)

    def switch(self, name: str, default: bool | None) -> Any:
        """Return the value of a setting that must be true or false.

        Raises:
            UserError: It is something else.
        """
        value = self.values.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def side(self, name: str, default: str) -> Literal["left", "right"]:
        """Return the value of a setting that must be "left" or "right".

        Raises:
            UserError: It is something else.
        """
        value = self.values.get(name, default)
        if value not in ("left", "right"):
            raise self.refusal(name, "must be 'left' or 'right'")
        return value

    def max_length(self) -> int | None:
        """Return the largest number of tokens in an example, or None if no setting limits it.

        Raises:
            UserError: The setting is not a positive number.
        """
        name = "model_max_length" if "model_max_length" in self.values else "max_len"
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < float("inf"):
            raise self.refusal(name, "must be a positive number")
        return int(value)

    def refusal(self, name: str, why: str) -> UserError:
        """Return the error which says that a setting cannot be followed, and why."""
        named = {**dict(self.special), **self.values}
        return UserError(f"{self.folder / SETTINGS_NAMES[0]}: {name} is {named.get(name)!r}, but {why}")

    def add_tokens(self, library: tokenizers.Tokenizer) -> None:
        """Add the special and the added tokens to a tokenizer, in the order of transformers.

        Raises:
            UserError: An added token gets another number than the files say.
        """
        present = library.get_added_tokens_decoder().values()
        shown = {*map(repr, present)}
        adding: list[str | AddedToken] = [token for _, token in sorted(self.added.items()) if repr(token) not in shown]
        contents = {*map(_content, present), *map(_content, adding)}
        for token in (*self.special.values(), *self.extra):
            # The same token as text and as an `AddedToken` is added twice, and the second one counts.
            if token is not None and _content(token) not in contents and token not in adding:
                adding.append(token)
        named = {_content(token) for token in self.special.values() if token is not None}
        for token in adding:
            if isinstance(token, AddedToken) and _content(token) in named:
                token.special = True
        library.add_tokens([AddedToken(token, special=True) if isinstance(token, str) else token for token in adding])
        for number, token in self.added.items():
            if (given := library.token_to_id(_content(token))) != number:
                raise UserError(
                    f"{self.folder}: the files of the tokenizer say that {_content(token)!r} is token {number}, but"
                    f" after its vocabulary it is token {given}"
                )


def read_settings(folder: Path, tree: Mapping[str, Any] | None) -> Settings:
    """Read the settings of the tokenizer in a folder.

    Args:
        folder: The folder.
        tree: The content of its `tokenizer.json`, or None if it has no such file.

    Raises:
        UserError: A file is damaged, or a setting cannot be followed.
    """
    config, tokens_map, added_tokens = (_read(folder / name) for name in SETTINGS_NAMES)
    values: dict[str, Any] = dict(config or {})
    kind = _kind(folder, values.pop("tokenizer_class", None), tree)
    where = folder / SETTINGS_NAMES[0]
    # In special_tokens_map.json the name of a file would replace the files of the folder.
    for path, said in ((where, values), (folder / SETTINGS_NAMES[1], tokens_map or {})):
        names = (*_REFUSED, *_FILES) if said is tokens_map else _REFUSED
        if refused := [name for name in names if said.get(name)]:
            raise UserError(
                f"{path}: {refused[0]} is not supported: remove it, or save the tokenizer with transformers"
            )
    try:
        return _merged(folder, kind, values, tokens_map or {}, added_tokens or {}, tree or {})
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} or a file of settings beside it is damaged: {error}") from error


def _merged(
    folder: Path,
    kind: str,
    values: dict[str, Any],
    tokens_map: dict[str, Any],
    added_tokens: dict[str, Any],
    tree: Mapping[str, Any],
) -> Settings:
    """Combine the content of all files into `Settings`. Errors of Python mean that a value has a wrong type."""
    if "additional_special_tokens" in values and not values.get(_EXTRA):
        values[_EXTRA] = values.pop("additional_special_tokens")
    specific = {name: values.pop(name) for name in [*values] if _is_specific(name, values[name], str)}
    if isinstance(values.get(_EXTRA), dict):
        specific.update(values.pop(_EXTRA))
    specific = specific or values.get("model_specific_special_tokens") or {}
    if "added_tokens_decoder" in values:
        added = {int(number): _added(token) for number, token in values["added_tokens_decoder"].items()}
    else:
        values |= {name: _of_map(name, value, values) for name, value in tokens_map.items()}
        if isinstance(values.get(_EXTRA), dict):
            specific = {**specific, **values.pop(_EXTRA)}
        added = _listed(values, added_tokens) | {token["id"]: _added(token) for token in tree.get("added_tokens", ())}
    values, specific = _converted(values), _converted(specific)
    extra = values.get(_EXTRA, values.get("additional_special_tokens"))
    if not isinstance(extra, list | None):
        raise TypeError(f"{_EXTRA} is {extra!r}, but must be a list")
    contents = {_content(token): token for token in added.values()}
    own = {name: values[name] for name in _SPECIAL if name in values}
    own = {name: value if value is None else contents.get(_content(value), value) for name, value in own.items()}
    other = {name: value for name, value in values.items() if _is_specific(name, value, (str, AddedToken))}
    specific = {name: _token(value) for name, value in specific.items()}
    padding = tree.get("padding") or {}  # A `tokenizer.json` with padding names the token for it.
    defaults: Mapping[str, str | None] = _DEFAULTS[kind] or {"pad_token": padding.get("pad_token")}
    named = {**dict.fromkeys(_SPECIAL), **defaults, **own, **other, **specific}
    return Settings(folder, kind, values, named, tuple(map(_token, extra or ())), added)


def _is_specific(name: str, value: Any, types: type | tuple[type, ...]) -> bool:
    """Return whether a setting is a special token that only some models have, such as "image_token"."""
    return name not in _SPECIAL and name.endswith("_token") and isinstance(value, types)


def _of_map(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """Convert a value of `special_tokens_map.json` to a setting. Tokens without a name are added to earlier ones."""
    if name != _EXTRA:
        return _added(value, special=True) if isinstance(value, dict) else value
    if not isinstance(value, list):
        return value
    # transformers skips tokens that it already has. Repeated tokens change nothing.
    tokens = [_added(token, special=True) if isinstance(token, dict) else token for token in value]
    return [*(values.get(_EXTRA) or []), *tokens]


def _listed(values: Mapping[str, Any], added_tokens: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Convert the content of `added_tokens.json` to a dictionary of tokens by number."""
    special = {str(values[name]) for name in _SPECIAL if values.get(name)} | {*map(str, values.get(_EXTRA) or [])}
    listed = {}
    for token, number in added_tokens.items():
        if type(number) is not int:
            raise TypeError(f"the token {token!r} has the number {number!r}")
        listed[number] = AddedToken(token, normalized=token not in special, special=token in special)
    return listed


def _kind(folder: Path, name: Any, tree: Mapping[str, Any] | None) -> str:
    """Return how transformers reads the tokenizer in a folder: as `BERT`, `ROBERTA` or `WHOLE`."""
    model = _read(folder / "config.json") or {}
    model_type = model.get("model_type")
    of_model = _CLASS_OF_MODELS.get(model_type) if isinstance(model_type, str) else None
    known = f"known are {', '.join((BERT, ROBERTA, *DECODERS))} and {WHOLE}"
    if of_model is not None and model_type in _SETTLED:
        return of_model
    if name is not None:
        if not isinstance(name, str) or name.removesuffix("Fast") not in _CLASSES:
            near = did_you_mean(str(name), _CLASSES)
            raise UserError(f"{folder / SETTINGS_NAMES[0]}: tokenizer_class is {name!r}; {known}{near}")
        kind = _CLASSES[name.removesuffix("Fast")]
        return WHOLE if kind == LLAMA and _has_bytes(tree) else kind
    if (hidden := model.get("tokenizer_class")) not in (None, of_model, f"{of_model}Fast"):
        raise UserError(
            f"{folder / 'config.json'} says tokenizer_class = {hidden!r}: say that in {SETTINGS_NAMES[0]}, so that it"
            " stays with the tokenizer"
        )
    if of_model is None and model_type is not None:
        raise UserError(
            f"{folder / 'config.json'} says model_type = {model_type!r}, and {SETTINGS_NAMES[0]} says no"
            f" tokenizer_class; {known}"
        )
    if of_model is not None:
        return of_model
    if tree is not None:
        return _CLASS_OF_VOCABULARIES.get(tree["model"].get("type"), WHOLE)
    return BERT if (folder / VOCABULARY_NAMES[BERT][0]).is_file() else ROBERTA


def _has_bytes(tree: Mapping[str, Any] | None) -> bool:
    """Return whether a `tokenizer.json` works with bytes, as that of Llama 3 does and a `LlamaTokenizer` does not."""
    return any('"ByteLevel"' in json.dumps((tree or {}).get(part)) for part in ("pre_tokenizer", "decoder"))


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _added(token: Any, **changes: bool) -> AddedToken:
    """Convert a dictionary that describes a token to an `AddedToken`. Unknown keys are ignored."""
    if not isinstance(token, dict):
        raise TypeError(f"an added token is {token!r}, but must be an object")
    return AddedToken(**{name: token[name] for name in _FIELDS if name in token} | changes)


def _converted(value: Any) -> Any:
    """Replace all dictionaries in a value that describe a token with `AddedToken`s."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return _added(value)
        return {key: _converted(part) for key, part in value.items()}
    return [_converted(part) for part in value] if isinstance(value, list) else value


def _content(token: Any) -> str:
    token = _token(token)
    return token if isinstance(token, str) else token.content


def _token(token: Any) -> Any:
    if not isinstance(token, (str, AddedToken)):
        raise TypeError(f"a special token is {json.dumps(token, default=repr)}, but must be a string")
    return token
