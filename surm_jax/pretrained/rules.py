"""Rules that map the keys of a file to the parameters of a model, with strict checks in both directions.

Every key of the file must be used or ignored, every parameter must be filled exactly once, and shapes must fit.
One error reports all violations. Formats differ only in their rules.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import jax
import jax.numpy as jnp
import numpy as np

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import is_finite

MOST_LISTED = 8

Transform = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""Converts an array of a file into a parameter: `(array, shape of the parameter) -> array`."""


def as_is(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array itself: the file and the model have the same layout."""
    del shape
    return array


@dataclass(frozen=True)
class KeyRule:
    r"""A rule that says which parameter a key of a file fills, and how.

    >>> re.fullmatch(r"layer_(\d+)/w", "layer_3/w").expand(r"blocks/\1/kernel")
    'blocks/3/kernel'
    """

    # A regular expression that the whole key must match.
    source: str
    # The parameter's path, with `\1` ... for the groups of `source`.
    target: str
    # Converts the layout of the file to the layout of the model.
    transform: Transform = as_is


def fill(
    keys: Iterable[str],
    read: Callable[[str], np.ndarray],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[KeyRule],
    *,
    ignore: Sequence[str] = (),
    fresh: Collection[str] = (),
    origin: str,
) -> dict[str, jax.Array]:
    """Read the parameters of a model from a file, one at a time, in the order of the file.

    All names are matched before an array is read. Floating-point arrays are widened to the parameter's dtype where
    this is exact (bfloat16 and float16 to float32), and rounded if the model was built with bfloat16 parameters. Other
    changes of dtype are refused, and so are NaN and infinity. This needs memory for the result and one array.

    Args:
        keys: The names in the file.
        read: Returns the array of a name.
        targets: The shape, dtype and sharding of each parameter to fill, by path.
        rules: The rules; the first one that matches a key applies.
        ignore: Patterns of keys to skip, tried before the rules. A pattern may match no key.
        fresh: Paths of parameters that the model has but the file must not fill; keys for them are skipped.
        origin: The name of the file in errors.

    Returns:
        An array for every target.

    Raises:
        UserError: No rule knows a key, no key or several keys fill a parameter, a shape or dtype does not fit, or
            numbers are not finite. One message holds all problems of a kind, with the nearest names.
    """
    plan = _assign(keys, targets, rules, ignore, fresh, origin)
    problems, filled = [], {}
    for target, (key, transform) in plan.items():
        wanted = targets[target]
        stored = read(key)
        if not _holds(wanted.dtype, stored.dtype):
            problems.append(f"{key!r} is {stored.dtype}, which {target!r} of {wanted.dtype} cannot hold exactly")
            continue
        try:
            array = transform(stored, wanted.shape)
        except UserError as error:
            problems.append(f"{key!r} does not fit {target!r}: {error}")
            continue
        if array.shape != wanted.shape:
            problems.append(f"{key!r} has shape {stored.shape}, but {target!r} is {wanted.shape}")
        elif not is_finite(array):
            problems.append(f"{key!r} holds numbers that are not finite")
        elif not problems:
            filled[target] = _place(array, wanted)
    _raise(origin, problems, len(problems))
    return filled


def _holds(wanted: np.dtype, stored: np.dtype) -> bool:
    """Return whether a parameter of dtype `wanted` may be filled with numbers of dtype `stored`."""
    if not jnp.issubdtype(stored, jnp.floating):
        return False
    return np.can_cast(stored, wanted) or wanted == jnp.bfloat16


def _place(array: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an array on its devices, once it is copied, so that the next array is read only afterwards."""
    array = array.astype(wanted.dtype, copy=False)
    if wanted.sharding is None:
        placed = jnp.asarray(array)
    else:
        # Each process copies only its own parts.
        placed = jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: array[index])
    return jax.block_until_ready(placed)


def _assign(
    keys: Iterable[str],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    rules: Sequence[KeyRule],
    ignore: Sequence[str],
    fresh: Collection[str],
    origin: str,
) -> dict[str, tuple[str, Transform]]:
    """Return the key and the transform of every target, in the order of the keys."""
    wanted: dict[str, list[tuple[str, Transform]]] = {target: [] for target in targets}
    unknown, misplaced, recognised = [], [], []
    plan = {}
    for key in keys:
        if any(re.fullmatch(pattern, key) for pattern in ignore):
            continue
        found = next(((match, rule) for rule in rules if (match := re.fullmatch(rule.source, key))), None)
        if found is None:
            unknown.append(key)
            continue
        match, rule = found
        target = match.expand(rule.target)
        if target in wanted:
            wanted[target].append((key, rule.transform))
            plan[target] = key, rule.transform
            recognised.append(key)
        elif target not in fresh:
            misplaced.append((key, target))

    filled = {target: sources[0][0] for target, sources in wanted.items() if sources}
    missing = [target for target in wanted if target not in filled]
    doubled = [target for target, sources in wanted.items() if len(sources) > 1]
    # Finding the nearest names is slow, so it is done only for the problems that are listed.
    problems = [f"nothing reads the key {key!r}{did_you_mean(key, recognised)}" for key in unknown[:MOST_LISTED]]
    problems += [
        f"the key {key!r} is for {target!r}, which the model does not have{did_you_mean(target, wanted)}"
        for key, target in misplaced[:MOST_LISTED]
    ]
    for target in missing[:MOST_LISTED]:
        near = get_close_matches(target, filled, n=1)
        problems.append(f"no key fills {target!r}{f' (as {filled[near[0]]!r} fills {near[0]!r})' if near else ''}")
    for target in doubled:
        problems.append(f"{target!r} is filled by {' and by '.join(repr(key) for key, _ in wanted[target])}")
    hint = "parameters that match `fresh`, such as those of a new head, are initialised instead" if missing else ""
    _raise(origin, problems, len(unknown) + len(misplaced) + len(missing) + len(doubled), hint)
    return plan


def _raise(origin: str, problems: Sequence[str], count: int, hint: str = "") -> None:
    """If there are problems, raise one error with the first of them, the number of the others, and a hint."""
    if problems:
        listed = [f"  {problem}" for problem in problems[:MOST_LISTED]]
        if count > len(listed):
            listed.append(f"  ... and {count - len(listed)} more")
        listed += [f"  ({hint})"] if hint else []
        raise UserError("\n".join([f"{origin} does not fit the model:", *listed]))
