"""Training some leaves of a parameter tree, for users who keep the whole tree under one optax chain.

The tree may be Linen's, Haiku's or `nnx.to_pure_dict`'s: any nest of dictionaries, lists and dataclasses.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from surm_jax.errors import UserError
from surm_jax.paths import require_match


def path_mask(tree: Any, patterns: Sequence[str]) -> Any:
    """Return a tree of booleans: whether a leaf's `/`-joined path matches one of the patterns as a whole.

    >>> path_mask({"body": {"kernel": 0.0, "bias": 0.0}, "head": {"bias": 0.0}}, [".*/bias"])
    {'body': {'bias': True, 'kernel': False}, 'head': {'bias': True}}

    Args:
        tree: Any pytree.
        patterns: Regular expressions (`re.fullmatch`).

    Raises:
        UserError: If a pattern matches no leaf; the message lists the nearest paths.
    """
    if isinstance(patterns, str):
        raise UserError(f"patterns must be a list, got one string: write [{patterns!r}]")
    paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    chosen = {path for pattern in patterns for path in require_match(pattern, paths, "leaf of the tree")}
    return jax.tree_util.tree_map_with_path(lambda path, _: _path(path) in chosen, tree)


def train_only(transformation: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """Apply an optax transformation to some leaves of a tree, and freeze all others.

    Frozen leaves get updates that are exactly zero, whatever their gradient, and have no state. (`optax.masked`
    would pass their raw gradients on.)

        optimizer = surm_jax.train_only(optax.adamw(1e-3), [r".*/delta/.*", "head/.*"])

    Args:
        transformation: The transformation, which sees only the trained leaves.
        patterns: Patterns for the paths of the trained leaves, as in `path_mask`.

    Raises:
        UserError: If there is no pattern; at `init`, if one matches no leaf.
    """
    if not patterns:
        raise UserError("train_only needs at least one pattern: without any nothing would be trained")
    patterns = patterns if isinstance(patterns, str) else tuple(patterns)

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda trained: "trained" if trained else "frozen", path_mask(tree, patterns))

    return optax.partition({"trained": transformation, "frozen": optax.set_to_zero()}, labels)


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
