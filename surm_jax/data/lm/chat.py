"""Turn chats into text with the template of a tokenizer, as transformers does.

A template is a program in the language Jinja that a stranger wrote. It runs in Jinja's sandbox and sees only plain
JSON. It follows `transformers/utils/chat_template_utils.py`, but cannot ask for the date (`strftime_now`), so that the
tokens are the same on every day.
"""

import contextvars
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from surm_jax.errors import UserError

Span = tuple[int, int]
_REASONING = ("reasoning_content", "thinking", "reasoning")
_spans: contextvars.ContextVar[tuple[list[str], list[Span]] | None] = contextvars.ContextVar("spans", default=None)


class Rendered(NamedTuple):
    """A chat as text, with the spans of characters that the assistant writes (`{% generation %}` in the template)."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """A compiled template.

    Attributes:
        marks: Whether the template has blocks `{% generation %}`, which mark what the assistant writes.

    Args:
        source: The text of the template.
        tokens: The special tokens by name, such as "bos_token", which the template may use.
        where: The file of the template, for messages.

    Raises:
        UserError: The template is not valid.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {}, "a file")
    >>> template.render([{"role": "user", "content": "Hi"}]).text
    '<user>Hi'
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "namespace": _Namespace, "dict": _dict}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template is damaged: {error}") from None
        self._tokens = tokens
        self.marks = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> Rendered:
        """Return a chat as text.

        Args:
            messages: The messages, with "role" and "content".
            tools: The descriptions of functions that the assistant may call.
            prompt: Whether to end with the text after which the assistant answers.

        Raises:
            ValueError: The template cannot render these messages.
        """
        blocks: list[str] = []
        spans: list[Span] = []
        token = _spans.set((blocks, spans))
        try:
            for block in self._template.generate(
                messages=[_message(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            ):
                blocks.append(block)
        except Exception as error:  # A template of strangers may raise anything.
            raise ValueError(f"the chat template cannot render the messages: {error}") from None
        finally:
            _spans.reset(token)
        return Rendered("".join(blocks), tuple(spans))


class _Generation(jinja2.ext.Extension):
    """A Jinja extension for the block `{% generation %}`, which marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text, tracked = caller(), _spans.get()
        if tracked is not None:
            blocks, spans = tracked
            start = sum(map(len, blocks))
            spans.append((start, start + len(text)))
        return text


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without empty values, and with its reasoning under all names that templates use for it."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace object, without names that begin with an underscore, which could reach the inside of Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        any(map(_Namespace._check, values))
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        self._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name}")


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
