"""Train selected leaves of a parameter tree, when the whole tree is passed to one optax optimiser.

The tree may be any pytree of nested dictionaries, lists and dataclasses, such as those of Linen, Haiku or
`nnx.to_pure_dict`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from surm_jax.errors import UserError
from surm_jax.paths import require_match


def path_mask(tree: Any, patterns: Sequence[str]) -> Any:
    """Return a pytree of booleans, which are `True` for the leaves whose paths match one of the patterns.

    The path of a leaf is the sequence of its keys, joined by `/`.

    >>> path_mask({"body": {"kernel": 0.0, "bias": 0.0}, "head": {"bias": 0.0}}, [".*/bias"])
    {'body': {'bias': True, 'kernel': False}, 'head': {'bias': True}}

    Args:
        tree: Any pytree.
        patterns: Regular expressions for whole paths (`re.fullmatch`).

    Raises:
        UserError: If a pattern matches no leaf. The message lists the nearest paths.
    """
    if isinstance(patterns, str):
        raise UserError(f"patterns must be a list, got one string: write [{patterns!r}]")
    paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    chosen = {path for pattern in patterns for path in require_match(pattern, paths, "leaf of the tree")}
    return jax.tree_util.tree_map_with_path(lambda path, _: _path(path) in chosen, tree)


def train_only(transformation: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """Return an optax transformation that applies the given one to some leaves of a tree and freezes all others.

    The update of a frozen leaf is exactly zero, whatever its gradient, and a frozen leaf has no optimiser state.
    With `optax.masked` instead, the update of such a leaf would be its raw gradient.

        optimizer = surm_jax.train_only(optax.adamw(1e-3), [r".*/delta/.*", "head/.*"])

    Args:
        transformation: The transformation for the trained leaves. The other leaves are not passed to it.
        patterns: Regular expressions for the paths of the trained leaves, as in `path_mask`.

    Raises:
        UserError: If `patterns` is empty. If a pattern matches no leaf, the error is raised by the `init` of the
            returned transformation.
    """
    if not patterns:
        raise UserError("train_only needs at least one pattern: with none, nothing would be trained")
    patterns = patterns if isinstance(patterns, str) else tuple(patterns)

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda trained: "trained" if trained else "frozen", path_mask(tree, patterns))

    return optax.partition({"trained": transformation, "frozen": optax.set_to_zero()}, labels)


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
