"""The exception for mistakes that the user can correct, and helpers for its messages.

The command line program (`launch.py`) prints the message of a `UserError` and exits with status 1, without a traceback.
"""

import itertools
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

_LONGEST_MESSAGE = 4000
_LONGEST_NAME = 100
_MOST_NAMES = 1000


class UserError(ValueError):
    r"""An error that the user can correct, such as a wrong argument or a damaged file.

    Its message says what is wrong, where, and what would be right. The message may quote names and values from
    untrusted files. Therefore `str(error)` shows control characters as escape sequences, and replaces the middle of a
    message of more than 4,000 characters by ` ... `.

    In the example, the message contains an escape character, with which a file could control the user's terminal.

    >>> str(UserError("no layer \x1b[2J" + "a" * 10_000))[:20], len(str(UserError("a" * 10_000)))
    ('no layer \\x1b[2Jaaaa', 4005)
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 2 :]}"
        return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return text for the end of an error message, which suggests known names that are similar to `name`.

    The result is, for example, `"; did you mean 'a' or 'b'?"`, or an empty string if no known name is similar. Only the
    first thousand known names, and names of at most a hundred characters, are compared, because a file may hold
    millions.

    Args:
        name: The unknown name that the user gave.
        known: The names that would be valid.
        most: Largest number of names to suggest.

    >>> did_you_mean("circulent", ["circulant", "lora"])
    "; did you mean 'circulant'?"
    >>> did_you_mean("zebra", ["circulant", "lora"])
    ''
    """
    if len(name) > _LONGEST_NAME:
        return ""
    some = [other for other in itertools.islice(known, _MOST_NAMES) if len(other) <= _LONGEST_NAME]
    close = get_close_matches(name, some, n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def require_one_of(what: str, value: Any, known: Collection[str]) -> None:
    """Check that a value is one of the known names.

    Args:
        what: A description of the value, such as the name of an option. The message of the error begins with it.
        value: The value to check. It may have any type.
        known: The known names.

    Raises:
        UserError: The value is not one of the known names. The message suggests the most similar names.

    >>> require_one_of("decay", "cosin", ("cosine", "linear"))
    Traceback (most recent call last):
    surm_jax.errors.UserError: decay must be one of ('cosine', 'linear'), got 'cosin'; did you mean 'cosine'?
    """
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{what} must be one of {tuple(known)}, got {value!r}{did_you_mean(str(value), known)}")


def first_line(error: Exception) -> str:
    r"""Return the type of an error and at most 1,000 characters of the first line of its message.

    >>> first_line(ValueError("no room\nat address 7"))
    'ValueError: no room'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:1000]}" if lines else type(error).__name__
