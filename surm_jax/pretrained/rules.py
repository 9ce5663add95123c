"""Rules that map the keys of a checkpoint file to the parameters of a model, and a function that applies them.

Every key must be used or ignored, every parameter must be filled exactly once, and shapes must agree. One error reports
all keys and parameters that break these conditions. Each file format has its own list of rules.
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
"""A function that converts an array of a file to a parameter: `(array, shape of the parameter) -> array`."""


def as_is(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array unchanged, for a parameter that has the same layout in the file and in the model."""
    del shape
    return array


@dataclass(frozen=True)
class KeyRule:
    r"""A rule that says which parameter the array of a key fills, and how the array is converted.

    With `source` = "layer_(\d+)/w" and `target` = "blocks/\1/kernel", the key "layer_3/w" fills the parameter at
    "blocks/3/kernel":

    >>> re.fullmatch(r"layer_(\d+)/w", "layer_3/w").expand(r"blocks/\1/kernel")
    'blocks/3/kernel'
    """

    # A regular expression that the whole key must match.
    source: str
    # The path of the parameter. `\1`, `\2`, ... stand for the texts that the groups of `source` match.
    target: str
    # A function that converts the array from the layout of the file to that of the model.
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

    All keys are matched to parameters before the first array is read. A floating-point array is cast to the dtype of
    its parameter if this is exact, as from float16 to float32, or if the parameter is bfloat16. Other changes of dtype,
    NaN and infinity are refused. The host needs memory for the result and for one more array.

    Args:
        keys: The names of the arrays in the file.
        read: A function that returns the array of a key.
        targets: The shape, dtype and sharding of each parameter to fill, by path.
        rules: The rules. The first rule that matches a key applies to it.
        ignore: Regular expressions for keys to skip. They take precedence over the rules, and may match no key.
        fresh: The paths of the model's parameters that are not read. Keys for these parameters are skipped.
        origin: The name of the file in error messages.

    Returns:
        The array of each parameter in `targets`, by path.

    Raises:
        UserError: No rule matches a key, a key is for a parameter that the model lacks, a parameter has no key or
            several keys, a shape or dtype does not fit, or an array holds NaN or infinity. All problems with keys are
            reported together, with similar names that exist. If all keys are right, all problems with arrays are
            reported together.
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
    """Return whether an array of dtype `stored` may fill a parameter of dtype `wanted`."""
    if not jnp.issubdtype(stored, jnp.floating):
        return False
    return np.can_cast(stored, wanted) or wanted == jnp.bfloat16


def _place(array: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Cast an array to the wanted dtype, copy it to its devices, and wait until the copy is complete.

    So the host never holds more than one array that is still being copied.
    """
    array = array.astype(wanted.dtype, copy=False)
    if wanted.sharding is None:
        placed = jnp.asarray(array)
    else:
        # Each process copies only the shards that its own devices hold.
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
    """Return which key fills which parameter, and the function that converts its array, in the order of the keys.

    Raises:
        UserError: Keys and parameters do not match one to one. See `fill`.
    """
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
    # Searching for similar names is slow, so it is done only for the problems that the message lists.
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
    """Raise a `UserError` that lists problems, if there are any.

    Args:
        origin: The name of the file.
        problems: Descriptions of problems. The message lists at most `MOST_LISTED` of them.
        count: The number of all problems. The message says how many it does not list.
        hint: A sentence for the end of the message, or an empty string.
    """
    if problems:
        listed = [f"  {problem}" for problem in problems[:MOST_LISTED]]
        if count > len(listed):
            listed.append(f"  ... and {count - len(listed)} more")
        listed += [f"  ({hint})"] if hint else []
        raise UserError("\n".join([f"{origin} does not fit the model:", *listed]))
