"""Paths of modules and parameters in a model, and the regular expressions that select them.

A path consists of the keys from the root of a model to a module or parameter, joined by `/`, such as
`blocks/0/attention/query/kernel`. A pattern is a regular expression that must match a whole path. A pattern that a user
gives must match at least one path of the model, or an error is raised.

Patterns also come from untrusted adapter files, and matching a regular expression can take exponential time. The
`regex` library can stop after a time limit, which Python's `re` cannot do.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import regex

from surm_jax.errors import UserError

_LONGEST_PATTERN = 2**16
_SECONDS_PER_MATCH = 1.0


def join(path: Iterable[Any]) -> str:
    """Return the path as a string, from a tuple of keys such as `flax.nnx` uses.

    >>> join(("blocks", 0, "attention", "query"))
    'blocks/0/attention/query'
    """
    return "/".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class PathPattern:
    """A valid pattern for paths. Make one with `compile_pattern`, which checks the regular expression.

    Attributes:
        text: The regular expression.
    """

    text: str

    def matches(self, path: str) -> bool:
        """Return whether the pattern matches the whole path.

        Raises:
            UserError: The match takes longer than one second.
        """
        try:
            return _compiled(self.text).fullmatch(path, timeout=_SECONDS_PER_MATCH) is not None
        except TimeoutError:
            raise UserError(
                f"the path pattern {self.text!r} takes very long to match {path!r}: repeat single characters, such as"
                " .* or \\d+, rather than groups"
            ) from None


def compile_pattern(pattern: str) -> PathPattern:
    """Check a regular expression for paths, and return it as a `PathPattern`.

    >>> compile_pattern("blocks/.*/kernel").matches("blocks/0/kernel")
    True

    Raises:
        UserError: The pattern is not a string, is not a valid regular expression, or has more than 65,536 characters.
    """
    if not isinstance(pattern, str):
        raise UserError(f"a path pattern must be a string, got {pattern!r}")
    if len(pattern) > _LONGEST_PATTERN:
        raise UserError(f"a path pattern has at most {_LONGEST_PATTERN:,} characters, got {len(pattern):,}")
    try:
        _compiled(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise UserError(f"the path pattern {pattern!r} is not a regular expression: {error}") from None
    return PathPattern(pattern)


@functools.lru_cache(4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    r"""Return the paths that `pattern` matches from beginning to end, in the order in which they are given.

    In the example, the second path is not returned, because the pattern matches only the beginning of it.

    >>> matching(r"blocks/\d+/up", ["blocks/0/up", "blocks/0/up/kernel", "head"])
    ['blocks/0/up']
    """
    compiled = compile_pattern(pattern)
    return [path for path in paths if compiled.matches(path)]


def no_match_message(pattern: str, paths: Sequence[str], what: str) -> str:
    """Return the error message for a pattern that matches none of `paths`.

    The message lists at most five paths that are similar to the pattern. Of several paths that differ only in numbers,
    such as `blocks/0/mlp` and `blocks/11/mlp`, it lists only the first.

    Args:
        pattern: The regular expression, which must match whole paths.
        paths: The paths in the model.
        what: The kind of object that the paths lead to, such as "parameter". The message uses this word.
    """
    distinct: dict[str, str] = {}
    for path in paths:
        distinct.setdefault(regex.sub(r"\d+", "#", path), path)
    # Remove the special characters of the regular expression, which would make it differ from every path.
    plain = regex.sub(r"\\[dwsb]|[.*+?()|\[\]^${}\\]", "", pattern)
    near = get_close_matches(plain, [regex.sub(r"\d+", "", path) for path in distinct.values()], n=5, cutoff=0.3)
    names = list(distinct.values())
    by_plain = dict(zip([regex.sub(r"\d+", "", path) for path in names], names, strict=True))
    shown = [by_plain[path] for path in near] or names[:5]
    if not shown:
        return f"the pattern {pattern!r} matches no {what}: the model has none"
    return (
        f"the pattern {pattern!r} matches no {what} (it must match a whole path); nearest of {len(paths)}: "
        + ", ".join(shown)
    )


def require_match(pattern: str, paths: Sequence[str], what: str) -> list[str]:
    """Return the paths that `pattern` matches from beginning to end, and raise an error if there are none.

    Args:
        pattern: The regular expression, which must match whole paths.
        paths: The paths in the model.
        what: The kind of object that the paths lead to, such as "parameter". The message of the error uses this word.

    Raises:
        UserError: No path matches. The message lists similar paths.
    """
    found = matching(pattern, paths)
    if not found:
        raise UserError(no_match_message(pattern, paths, what))
    return found
