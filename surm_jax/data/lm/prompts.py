"""Read prompts from JSON lines, for a model that continues them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surm_jax.data.lm.lines import check_messages, objects
from surm_jax.data.lm.tokenizer import PromptTokenizer
from surm_jax.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """The prompts in a file.

    Attributes:
        lines: The number of the line of each prompt, counted from 1.
        tokens: The tokens of each prompt.
        malformed: A message for each malformed line, with its number.
    """

    lines: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    malformed: tuple[str, ...]


def read_prompts(path: Path, tokenizer: PromptTokenizer, *, most_tokens: int) -> Prompts:
    """Read a file of prompts, with one JSON object in each line, and turn them into tokens as in training.

    An object has "prompt", or "messages" (and perhaps "tools") for a chat that the assistant continues. Other keys are
    ignored, such as the "completion" in lines to train on.

    Args:
        path: The file.
        tokenizer: The tokenizer of the model.
        most_tokens: The largest number of tokens in a prompt. A longer one is malformed.

    Raises:
        UserError: The file cannot be read, no line is well-formed, or a line is a chat and the tokenizer has no
            template.
    """
    lines, tokens, malformed = [], [], []
    for number, values in objects(path):
        try:
            found = _tokens(values, tokenizer, f"{path}, line {number}")
            if len(found) > most_tokens:
                raise ValueError(f"the prompt has {len(found)} tokens, but there is room for {most_tokens}")
            lines.append(number)
            tokens.append(found)
        except UserError:
            raise
        except ValueError as error:
            malformed.append(f"{path}, line {number}: {error}")
    if not lines:
        raise UserError(malformed[0] if malformed else f"{path} holds no prompts")
    return Prompts(tuple(lines), tuple(tokens), tuple(malformed))


def _tokens(values: Mapping[str, Any] | ValueError, tokenizer: PromptTokenizer, place: str) -> tuple[int, ...]:
    if isinstance(values, ValueError):
        raise values
    if ("prompt" in values) == ("messages" in values):
        raise ValueError(f"it has the keys {sorted(values)}, but must have either prompt or messages")
    if "messages" in values:
        return _encoded(_chat(values, tokenizer, place), tokenizer)
    if not isinstance(values["prompt"], str):
        raise ValueError(f"prompt must be text, got {type(values['prompt']).__name__}")
    tokens = _encoded(values["prompt"], tokenizer)
    tokens = tokens if tokens[: len(tokenizer.start)] == tokenizer.start else tokenizer.start + tokens
    if not tokens:
        raise ValueError("prompt is empty, and the tokenizer has no token that begins a text")
    return tokens


def _chat(values: Mapping[str, Any], tokenizer: PromptTokenizer, place: str) -> str:
    check_messages(values["messages"])
    if values["messages"][-1]["role"] == "assistant":
        raise ValueError("the last message is one of the assistant: there is nothing to answer")
    if tokenizer.template is None:
        raise UserError(
            f"{place} has messages, but the tokenizer in {tokenizer.files[0].parent} has no chat template: add one as"
            " chat_template.jinja, or write prompt"
        )
    return tokenizer.template.render(values["messages"], values.get("tools"), prompt=True).text


def _encoded(text: str, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    text.encode()  # Raises a `ValueError` for half of a surrogate pair.
    return tuple(tokenizer.encode([text])[0].ids)
