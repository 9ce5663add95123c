"""The exception for mistakes that the user can correct.

`launch.py` prints its message and exits with status 1, without a traceback. Any other exception that reaches the user
is a bug.
"""

import itertools
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

_LONGEST_MESSAGE = 4000
_LONGEST_NAME = 100
_MOST_NAMES = 1000


class UserError(ValueError):
    r"""A mistake in the input: the message says what is wrong, where, and what would be right.

    The message may quote names and values from untrusted files. Therefore control characters are shown as escapes, and
    the middle of a very long message is left out.

    >>> str(UserError("no layer \x1b[2J" + "a" * 10_000))[:20], len(str(UserError("a" * 10_000)))
    ('no layer \\x1b[2Jaaaa', 4005)
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST_MESSAGE:
            text = f"{text[: _LONGEST_MESSAGE // 2]} ... {text[-_LONGEST_MESSAGE // 2 :]}"
        return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return `"; did you mean 'a' or 'b'?"` with the known names nearest to `name`, or an empty string.

    Only the first thousand names are compared, and only names of at most a hundred characters, because a file may hold
    millions of names.

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
        what: Name of the value, for the start of the message.
        value: Any value.
        known: The known names.

    Raises:
        UserError: The value is not one of the known names. The message names the nearest ones.

    >>> require_one_of("decay", "cosin", ("cosine", "linear"))
    Traceback (most recent call last):
    surm_jax.errors.UserError: decay must be one of ('cosine', 'linear'), got 'cosin'; did you mean 'cosine'?
    """
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{what} must be one of {tuple(known)}, got {value!r}{did_you_mean(str(value), known)}")
