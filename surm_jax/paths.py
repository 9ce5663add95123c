"""Paths of modules and parameters, and the patterns that select them.

A path is the `/`-joined route from the root of a model, such as `blocks/0/attention/query/kernel`. A pattern is a
regular expression that must match the whole path (`re.fullmatch`). A pattern that selects nothing is always an error.
Patterns come with adapters of strangers, too: those that could keep the matcher busy for years are refused.
"""

import functools
import math
import re
import re._constants as ops
import re._parser as parser
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from surm_jax.errors import UserError

_LONGEST_PATTERN = 2**16
_LONGEST_PATH = 60
_MOST_WAYS, _MANY = 4e6, 1e30


def join(path: Iterable[Any]) -> str:
    """Joins the keys of an NNX path.

    >>> join(("blocks", 0, "attention", "query"))
    'blocks/0/attention/query'
    """
    return "/".join(map(str, path))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a path pattern.

    Raises:
        UserError: if it is not a string, not a valid regular expression, or one that could take very long.
    """
    if not isinstance(pattern, str):
        raise UserError(f"a path pattern must be a string, got {pattern!r}")
    try:
        if is_fast(pattern):
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"the path pattern {pattern!r} is not a regular expression: {error}") from None
    raise UserError(
        f"the path pattern {pattern!r} could take very long to match: repeat single characters, such as .* or \\d+, not"
        " groups, and at most four times between two |"
    )


@functools.lru_cache(4096)
def is_fast(pattern: str) -> bool:
    r"""Says whether matching a path takes little time for sure: the matcher tries all ways before it gives up.

    >>> is_fast(r"(.*/)?blocks/\\d+/(query|value)"), is_fast("(a*)*b"), is_fast("(a|a)" * 40)
    (True, False, False)

    Raises:
        re.error: if it is no regular expression; or `OverflowError`, `RecursionError`.
    """
    if len(pattern) > _LONGEST_PATTERN:
        return False
    choices, loops = _ways(parser.parse(pattern))
    # So many ways there are to cut a path into what each of the loops takes.
    return loops < 10 and choices * math.comb(_LONGEST_PATH + loops, loops) <= _MOST_WAYS


def _ways(parsed: parser.SubPattern) -> tuple[float, int]:
    """Bounds the ways through an expression: choices between alternatives, and loops of any number of rounds."""
    choices, loops = 1.0, 0
    for op, argument in parsed:
        match op:
            case ops.BRANCH:
                parts = [_ways(part) for part in argument[1]]
                own = sum(part[0] for part in parts), max(part[1] for part in parts)
            case ops.MAX_REPEAT | ops.MIN_REPEAT | ops.POSSESSIVE_REPEAT:
                own = _ways_of_repeat(*argument)
            case ops.SUBPATTERN | ops.ASSERT | ops.ASSERT_NOT:
                own = _ways(argument[-1])
            case ops.ATOMIC_GROUP:
                own = _ways(argument)
            case ops.GROUPREF_EXISTS:
                parts = [_ways(part) for part in argument[1:] if part is not None]
                own = sum(part[0] for part in parts), max(part[1] for part in parts)
            case _:  # one character, one place, or what a group matched
                own = 1.0, 0
        choices, loops = min(choices * own[0], _MANY), loops + own[1]
    return choices, loops


def _ways_of_repeat(least: int, most: int, body: parser.SubPattern) -> tuple[float, int]:
    choices, loops = _ways(body)
    if most == 1:
        return choices + (1 - least), loops
    shortest, longest = body.getwidth()
    if choices == 1 and not loops and shortest == longest:
        return 1.0, int(most > least)
    return (_MANY, 0) if most > 8 else (choices**most * (most - least + 1), loops * most)


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    r"""Returns the paths that `pattern` matches as a whole.

    >>> matching(r"blocks/\\d+/up", ["blocks/0/up", "blocks/0/up/kernel", "head"])
    ['blocks/0/up']
    """
    compiled = compile_pattern(pattern)
    return [path for path in paths if compiled.fullmatch(path)]


def no_match_message(pattern: str, paths: Sequence[str], what: str) -> str:
    """Says that `pattern` matches none of `paths`, and which of them come nearest.

    Layers repeat: of `blocks/0/...` to `blocks/11/...` only one path of each shape is shown.
    """
    distinct: dict[str, str] = {}
    for path in paths:
        distinct.setdefault(re.sub(r"\d+", "#", path), path)
    # The pattern's own syntax would hide how near it is to a path: compare what is left without it.
    plain = re.sub(r"\\[dwsb]|[.*+?()|\[\]^${}\\]", "", pattern)
    near = get_close_matches(plain, [re.sub(r"\d+", "", path) for path in distinct.values()], n=5, cutoff=0.3)
    names = list(distinct.values())
    by_plain = dict(zip([re.sub(r"\d+", "", path) for path in names], names, strict=True))
    shown = [by_plain[path] for path in near] or names[:5]
    if not shown:
        return f"the pattern {pattern!r} matches no {what}: the model has none"
    return (
        f"the pattern {pattern!r} matches no {what} (it must match a whole path); nearest of {len(paths)}: "
        + ", ".join(shown)
    )


def require_match(pattern: str, paths: Sequence[str], what: str) -> list[str]:
    """Returns the paths that `pattern` matches as a whole, at least one.

    Args:
        pattern: a regular expression for whole paths.
        paths: the paths to choose from.
        what: what the paths stand for, for the message, such as "parameter".

    Raises:
        UserError: if nothing matches; the message lists the nearest paths.
    """
    found = matching(pattern, paths)
    if not found:
        raise UserError(no_match_message(pattern, paths, what))
    return found
