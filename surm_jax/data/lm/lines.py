"""Read texts, prompts with completions, and chats from JSON lines: files with one JSON object in each line."""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from surm_jax.data.corrupt import skipping
from surm_jax.errors import UserError

FORMS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}
"""The forms of a line, each with the keys that the line must have."""

_SUFFIX = ".jsonl"
_TESTS = re.compile(r"(?:.*_)?(test|validation)")


class Line(NamedTuple):
    """A well-formed line.

    Attributes:
        place: The file and the number of the line, counted from 1, for messages about it.
        form: One of `FORMS`.
        values: The JSON object in the line.
    """

    place: str
    form: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class LineSource:
    """The well-formed lines of some files, in order, and what is wrong with each of the other lines."""

    lines: tuple[Line, ...]
    malformed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def select(self, indices: Sequence[int] | np.ndarray) -> "LineSource":
        """Return a source with the lines at `indices`, in this order, and the same malformed lines."""
        return LineSource(tuple(self.lines[index] for index in indices), self.malformed)


@dataclass(frozen=True)
class LineDataset:
    """A data set of JSON lines.

    Attributes:
        name: The name that was passed to `load_lines`.
        train: The lines to train on.
        tests: The lines for evaluation, as "test", "validation", both or neither.
        files: The files that were read.
        classes: Always empty, because the model continues text and chooses no class.
    """

    name: str
    train: LineSource
    tests: Mapping[str, LineSource]
    files: tuple[Path, ...]
    classes: tuple[str, ...] = field(default=(), init=False)


def is_lines(name: str) -> bool:
    """Return whether a name stands for JSON lines: a file or a pattern `*.jsonl`, or a folder that holds such files.

    >>> is_lines("chats.jsonl"), is_lines("chats/*.jsonl"), is_lines("cifar10")
    (True, True, False)
    """
    return name.endswith(_SUFFIX) or any(Path(name).expanduser().glob(f"*{_SUFFIX}"))


def load_lines(name: str, max_corrupt: int = 0) -> LineDataset:
    """Read JSON lines into memory.

    Every line is a JSON object with "text", with "prompt" and "completion", or with "messages" (a list of objects with
    "role" and "content", and perhaps "tools" beside it). Other keys are ignored, and so are empty lines.

    Args:
        name: The path of a file, a pattern of paths (`*`, `?`, `[...]`, and `**` for folders), or a folder of files
            `*.jsonl`. Files with names that end in `_test` or `_validation`, or that are named `test.jsonl` or
            `validation.jsonl`, are splits for evaluation. Beside a single file `NAME.jsonl`, these are
            `NAME_test.jsonl` and `NAME_validation.jsonl`.
        max_corrupt: The number of malformed lines in each split that are skipped, with a warning for each.

    Raises:
        UserError: There is no such file, a file cannot be read, no line is well-formed, or more lines are malformed.
            The message names the file and the number of the line.
    """
    paths = sorted(_paths(name))
    splits: dict[str, list[Path]] = {}
    for path in paths:
        match = _TESTS.fullmatch(path.stem) if len(paths) > 1 else None
        splits.setdefault(match[1] if match else "train", []).append(path)
    if len(paths) == 1:
        for split in ("test", "validation"):
            if (beside := paths[0].with_name(f"{paths[0].stem}_{split}{_SUFFIX}")).is_file():
                splits[split] = [beside]
    if "train" not in splits:
        raise UserError(f"{name} holds only files for evaluation ({', '.join(splits)}): nothing is left to train on")
    sources = {split: _read_all(files, max_corrupt) for split, files in splits.items()}
    files = tuple(path for split in splits.values() for path in split)
    return LineDataset(name, sources.pop("train"), dict(sorted(sources.items())), files)


def _paths(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    found = path.glob(f"*{_SUFFIX}") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    if not (files := [each for each in found if each.is_file()]):
        raise UserError(f"config.data.name={name}: there is no such file or pattern of files with JSON lines")
    return files


def _read_all(paths: Sequence[Path], max_corrupt: int) -> LineSource:
    lines: list[Line] = []
    malformed: list[str] = []
    for path in paths:
        for number, values in objects(path):
            place = f"{path}, line {number}"
            try:
                lines.append(_line(place, values))
            except ValueError as error:
                malformed.append(f"{place}: {error}")
                skipping(malformed[-1], len(malformed), max_corrupt)
    if not lines:
        raise UserError(f"{', '.join(map(str, paths))}: no line is a text, a prompt with its completion, or a chat")
    return LineSource(tuple(lines), tuple(malformed))


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the number of every line of a file that is not empty, counted from 1, and the JSON object in it.

    In place of a line that holds no JSON object, an error is yielded that says so.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, _object(line)
            except ValueError as error:
                cut = ". It is the last line and has no line break: is the file still being written?"
                yield number, ValueError(f"{error}{cut if number == len(lines) else ''}")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object was expected, got {type(values).__name__}")
    return values


def _line(place: str, values: dict[str, Any] | ValueError) -> Line:
    """Return a line with the object in it.

    Raises:
        ValueError: The line is malformed. The message says what is wrong.
    """
    if isinstance(values, ValueError):
        raise values
    forms = [form for form, keys in FORMS.items() if any(key in values for key in keys)]
    if len(forms) != 1:
        known = "text, prompt and completion, or messages"
        raise ValueError(f"it has the keys {sorted(values)}, but must have those of exactly one form: {known}")
    (form,) = forms
    if form == "messages":
        check_messages(values["messages"])
        if not any(message["role"] == "assistant" for message in values["messages"]):
            raise ValueError("no message of the assistant: there is nothing to learn")
    else:
        for key in FORMS[form]:
            _check_text(key, values.get(key), empty=key == "prompt")
    return Line(place, form, values)


def _check_text(key: str, value: Any, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {type(value).__name__}" if value is not None else f"no {key}")
    if not (value or empty):
        raise ValueError(f"{key} is empty")


def check_messages(messages: Any) -> None:
    """Check that the value "messages" of a line is a chat.

    Raises:
        ValueError: It is not. The message says what is wrong.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of objects")
    for message in messages:
        _check_text("role", message.get("role"))
        content = message.get("content")
        if isinstance(content, str):
            _check_text("content", content, empty=message["role"] != "assistant")
        elif not (isinstance(content, list) or (content is None and message.get("tool_calls"))):
            raise ValueError(f"a message of the {message['role']} has no content")
