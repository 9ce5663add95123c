"""Turn the examples in JSON lines into tokens, and mark the tokens that a model learns to write."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from surm_jax.data.corrupt import skipping
from surm_jax.data.lm.chat import ChatTemplate, Span
from surm_jax.data.lm.lines import Line, LineSource
from surm_jax.data.lm.tokenizer import PromptTokenizer
from surm_jax.errors import UserError

# The number of lines that are encoded at once. The library's result objects need much memory.
_CHUNK = 1024


@dataclass(frozen=True)
class LearnedTokens:
    """Tokenised examples in memory.

    Attributes:
        tokens: The tokens of all examples, concatenated.
        learned: True for each token that the model learns to write, given all tokens before it in its example.
        offsets: The indices in `tokens` at which the examples start. Example `i` is
            `tokens[offsets[i] : offsets[i + 1]]`.
        truncated: The number of examples that lost their end, because they were too long.
        skipped: What is wrong with each of the lines that are not among the examples.
    """

    tokens: Int[np.ndarray, "total"]
    learned: Bool[np.ndarray, "total"]
    offsets: Int[np.ndarray, "n+1"]
    truncated: int = 0
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """The number of tokens of each example."""
        return np.diff(self.offsets)


class _Plan(NamedTuple):
    """The texts to encode for one line, and the marked characters of the last text."""

    line: Line
    texts: tuple[str, ...]
    spans: tuple[Span, ...] | None = None


def encode_lines(
    tokenizer: PromptTokenizer, source: LineSource, *, max_length: int, end: int, max_corrupt: int = 0
) -> LearnedTokens:
    """Return the tokens of all lines, and which of them the model learns to write.

    All of a text is learned, but only the completion of a prompt. In a chat, what the assistant writes is learned: what
    the template marks with `{% generation %}`, or else what each message of the assistant adds to the messages before
    it. The end token follows every text, completion and chat, unless a template ends the last answer with a special
    token. It is learned too.

    A line is unusable if the tokens of its prompt change when its completion follows, if the messages before an answer
    are not the beginning of the whole chat, token by token, or if nothing that is learned is left after shortening.

    Args:
        tokenizer: The tokenizer of the model.
        source: The lines.
        max_length: The largest number of tokens in an example. Longer ones lose their end, with one warning for all.
        end: The token that ends a text.
        max_corrupt: The number of malformed and unusable lines that are skipped, with a warning for each.

    Raises:
        UserError: A line is a chat and the tokenizer has no template, or more lines are malformed or unusable.
    """
    skipped, kept, truncated = list(source.malformed), [], 0
    for start in range(0, len(source), _CHUNK):
        plans = []
        for line in source.lines[start : start + _CHUNK]:
            try:
                plan = _plan(tokenizer, line)
                "".join(plan.texts).encode()  # Raises a `ValueError` for half of a surrogate pair.
                plans.append(plan)
            except ValueError as error:
                _skip(skipped, line, error, max_corrupt)
        encodings = iter(tokenizer.encode([text for plan in plans for text in plan.texts]))
        for plan in plans:
            parts = [next(encodings) for _ in plan.texts]
            try:
                tokens, learned = _joined(tokenizer, plan, parts, end)
                if not learned[1:max_length].any():
                    raise ValueError(
                        f"the prompt has {learned.argmax()} tokens, but config.data.lengths ends with {max_length}:"
                        " nothing of the completion would be left"
                    )
            except ValueError as error:
                _skip(skipped, plan.line, error, max_corrupt)
                continue
            truncated += len(tokens) > max_length
            kept.append((tokens[:max_length], learned[:max_length]))
    if not kept:
        raise UserError(f"no line is left to learn from; the last one that was skipped: {skipped[-1]}")
    if truncated:
        warnings.warn(f"{truncated} of {len(kept)} examples are longer than {max_length} tokens: cut off", stacklevel=2)
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in kept)])
    tokens, learned = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
    return LearnedTokens(tokens, learned, offsets, truncated, tuple(skipped))


def _skip(skipped: list[str], line: Line, error: ValueError, max_corrupt: int) -> None:
    if isinstance(error, UserError):
        raise error
    skipped.append(f"{line.place}: {error}")
    skipping(skipped[-1], len(skipped), max_corrupt)


def _plan(tokenizer: PromptTokenizer, line: Line) -> _Plan:
    values = line.values
    if line.form == "text":
        return _Plan(line, (values["text"],))
    if line.form == "prompt":
        return _Plan(line, (values["prompt"], values["prompt"] + values["completion"]))
    if tokenizer.template is None:
        raise UserError(
            f"{line.place} has messages, but the tokenizer in {tokenizer.files[0].parent} has no chat template: add"
            " one as chat_template.jinja, or write prompt and completion"
        )
    return _chat_plan(line, tokenizer.template)


def _chat_plan(line: Line, template: ChatTemplate) -> _Plan:
    """Return the texts of a chat before and after each answer, and the whole chat, which suffices if it is marked."""
    messages, tools = line.values["messages"], line.values.get("tools")
    whole = template.render(messages, tools)
    if template.marks:
        return _Plan(line, (whole.text,), whole.spans)
    texts = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            texts.append(template.render(messages[:number], tools, prompt=True).text if number else "")
            texts.append(template.render(messages[: number + 1], tools).text)
    return _Plan(line, (*texts, whole.text))


def _joined(
    tokenizer: PromptTokenizer, plan: _Plan, parts: Sequence[tokenizers.Encoding], end: int
) -> tuple[Int[np.ndarray, "t"], Bool[np.ndarray, "t"]]:
    """Return the tokens of a line, and which of them are learned.

    Raises:
        ValueError: The line is unusable (`encode_lines`).
    """
    tokens = np.array(parts[-1].ids, np.int32)
    learned = np.full(len(tokens), plan.line.form == "text")
    if plan.line.form == "prompt":
        _require_beginning(parts[0].ids, parts[1].ids, "the tokens of the prompt change when the completion follows")
        learned[len(parts[0].ids) :] = True
    elif plan.spans is not None:
        starts, ends = np.array(parts[-1].offsets, np.int64).reshape(-1, 2).T
        for first, last in plan.spans:
            learned |= (starts < last) & (ends > first)
    elif plan.line.form == "messages":
        why = "the tokens of the messages before an answer change when the answer follows"
        for before, after in zip(parts[:-1:2], parts[1:-1:2], strict=True):
            _require_beginning(before.ids, after.ids, why)
            _require_beginning(after.ids, parts[-1].ids, why)
            learned[len(before.ids) : len(after.ids)] = True
    if not learned.any():
        raise ValueError("the completion has no tokens: there is nothing to learn")
    chat = plan.line.form == "messages"
    start = np.array(tokenizer.start, np.int32)
    if not chat and tokens[: len(start)].tolist() != start.tolist():
        tokens, learned = np.concatenate([start, tokens]), np.concatenate([start < 0, learned])
    if _lacks_end(tokenizer, plan.line, tokens, learned, end):
        tokens, learned = np.append(tokens, np.int32(end)), np.append(learned, True)
    return tokens, learned


def _lacks_end(tokenizer: PromptTokenizer, line: Line, tokens: np.ndarray, learned: np.ndarray, end: int) -> bool:
    if line.form != "messages":
        return bool(tokens[-1] != end)
    if line.values["messages"][-1]["role"] != "assistant":
        return False
    last = np.flatnonzero(learned)[-1]
    before = np.flatnonzero(~learned[:last])
    answer = before[-1] + 1 if len(before) else 0
    return tokenizer.special.isdisjoint(tokens[answer:].tolist())


def _require_beginning(part: Sequence[int], whole: Sequence[int], why: str) -> None:
    if list(part) != list(whole[: len(part)]):
        place = next((i for i, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other), len(whole))
        raise ValueError(f"{why} (from token {place + 1} of {len(part)})")
