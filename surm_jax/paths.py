"""Paths of modules and parameters, and the patterns that select them.

A path is the `/`-joined route from the root of a model, such as `blocks/0/attention/query/kernel`. A pattern is a
regular expression that must match the whole path (`re.fullmatch`). A pattern that selects nothing is always an error.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from surm_jax.errors import UserError


def join(path: Iterable[Any]) -> str:
    """Joins the keys of an NNX path.

    >>> join(("blocks", 0, "attention", "query"))
    'blocks/0/attention/query'
    """
    return "/".join(map(str, path))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a path pattern.

    Raises:
      UserError: if it is not a string, or not a valid regular expression.
    """
    if not isinstance(pattern, str):
        raise UserError(f"a path pattern must be a string, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"the path pattern {pattern!r} is not a regular expression: {error}") from None


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that `pattern` matches as a whole.

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
