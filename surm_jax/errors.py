"""The one exception for mistakes that the user can put right.

`launch.py` prints its message and exits with status 1, without a traceback. Whatever else reaches the user is a bug.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and what would be right."""


def did_you_mean(name: str, known: Iterable[str], most: int = 3) -> str:
    """Returns `"; did you mean 'a' or 'b'?"` for the known names nearest to `name`, or an empty string.

    >>> did_you_mean("circulent", ["circulant", "lora"])
    "; did you mean 'circulant'?"
    >>> did_you_mean("zebra", ["circulant", "lora"])
    ''
    """
    close = get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
