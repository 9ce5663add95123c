"""An adapter as another one: in another family, or combined of several, by nearest matrices, with the error.

An update of any kind can so be brought into the form that a server of LoRA adapters loads. A circulant of full rank has
a flat spectrum and loses much of itself in low rank: look at the errors.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.peft.adapt import make_part, matched_modules
from surm_jax.peft.adapter import Adapter
from surm_jax.peft.kernels import matrix_view
from surm_jax.peft.lifecycle import delete, parts_of
from surm_jax.peft.methods.base import Update
from surm_jax.peft.parts.attach import attach
from surm_jax.peft.parts.update import Delta
from surm_jax.structured import Family, Placed, Product, StructuredMatrix, Sum, refine


def convert(
    model: nnx.Module, adapter: Adapter, method: Update, *, name: str = "converted"
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Returns the model with the nearest updates of another method in the place of an adapter's.

    >>> import surm_jax
    >>> model, adapter = surm_jax.adapt(
    ...     nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [surm_jax.Rule("", surm_jax.CirculantUpdate())], rngs=nnx.Rngs(1)
    ... )
    >>> model.delta["default"].r1[...] = jnp.arange(4.0)
    >>> _, _, errors = convert(model, adapter, surm_jax.LoRA(rank=4))
    >>> errors[""] < 1e-5
    True

    Args:
        model: has the adapter, at any scale, which is part of what is converted.
        adapter: its recipe.
        method: of the new updates. What it has of learned alphas starts at 1.
        name: of the new adapter, which takes the place of the old one.

    Returns:
        The model, the new adapter, and the relative error of every update in the Frobenius norm, by the layer's path.

    Raises:
        UserError: if the adapter has branches, which are no matrices, or an update that is not finite, or the method is
            no update, or not possible for a layer.
    """
    if not isinstance(method, Update):
        raise UserError(f"an adapter is converted to an update such as LoRA(rank=4), not to {method!r}")
    targets = _changes(model, adapter)
    rules = tuple(dataclasses.replace(rule, method=method if rule.method else None) for rule in adapter.rules)
    converted = Adapter(rules, adapter.train, name)
    return _with_nearest(delete(model, adapter.name), converted, targets)


def combine(
    model: nnx.Module, weights: Mapping[Adapter, float], *, name: str = "combined"
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    """Returns the model with one more adapter, `sum of weight * update` of several with the same rules.

    Exact for families that are closed under sums, such as circulants in their stored form; otherwise the nearest matrix
    of the family.

    Args:
        model: has all of the adapters, at any scales, which are part of what is combined. Parameters trained besides
            are not: the model's own stay.
        weights: of every adapter; they need not sum to 1.
        name: of the new adapter. The others stay: switch them off with `set_active`.

    Returns:
        As `convert`.

    Raises:
        UserError: if the adapters have different rules, or branches, or updates that are not finite.
    """
    if not weights or not isinstance(weights, Mapping):
        raise UserError(f"combine needs a weight for every adapter, {{adapter: 0.5, ...}}, got {weights!r}")
    for adapter in weights:
        parts_of(model, adapter)  # whether they are there
    first, *others = weights
    for other in others:
        if other.rules != first.rules:
            raise UserError(
                f"the adapters {first.name!r} and {other.name!r} have different rules: convert one of them first"
            )
    total: dict[str, np.ndarray] = {}
    for adapter, weight in weights.items():
        for path, change in _changes(model, adapter).items():
            total[path] = total.get(path, 0) + weight * change
    return _with_nearest(model, Adapter(first.rules, (), name), total)


def _changes(model: nnx.Module, adapter: Adapter) -> dict[str, np.ndarray]:
    """Returns what an adapter adds to every kernel, dense."""
    changes = {}
    for path, name, part, layer in parts_of(model, adapter):
        if not isinstance(part, Delta):
            raise UserError(f"{path} has a branch of the adapter {name!r}: branches are no matrices")
        kernel = layer.kernel[...].reshape(matrix_view(layer, path).shape)
        changes[path] = np.asarray(part.change(kernel))
    if not changes:
        raise UserError(f"the adapter {adapter.name!r} has no update, which is what is converted and combined")
    return changes


def _with_nearest(
    model: nnx.Module, adapter: Adapter, targets: Mapping[str, np.ndarray]
) -> tuple[nnx.Module, Adapter, dict[str, float]]:
    model = nnx.clone(model)
    errors = {}
    for path, layer, rule in matched_modules(model, adapter):
        if rule.method.normalized:
            raise UserError(f"{rule.method.name} cannot be converted to: it normalises the kernel's columns")
        if not np.isfinite(targets[path]).all():
            raise UserError(f"{path or 'the model'} cannot be converted: its update holds values that are not finite")
        try:
            part = make_part(rule, path, layer, "auto", jax.random.key(0))
            part.fuse()
            nearest = _nearest_like(part.stored(), jnp.asarray(targets[path]) / part.factor)
        except UserError as error:
            raise UserError(f"{path or 'the model'} cannot be converted: {error}") from None
        if hasattr(part, "alpha"):
            part.alpha[...] = jnp.ones((), jnp.float32)
        for name, array in nearest.arrays().items():
            getattr(part, name)[...] = array
        difference = np.linalg.norm(part.factor * np.asarray(nearest.to_dense()) - targets[path])
        errors[path] = float(difference / max(np.linalg.norm(targets[path]), np.finfo(np.float32).tiny))
        attach(layer, adapter.name, part)
    return model, adapter, errors


def _nearest_like(matrix: StructuredMatrix, dense: Float[Array, "in out"]) -> StructuredMatrix:
    """Returns the matrix of the same family, sizes and blocks that is nearest to `dense`.

    Of products, and of sums whose terms are not blocks beside one another, it is the nearest one that a search finds.
    """
    if isinstance(matrix, Sum):
        terms = []
        for term in matrix.terms:
            terms.append(_nearest_like(term, dense - sum(found.to_dense() for found in terms)))
        blocks = all(isinstance(term, Placed) for term in terms)  # of one kernel: they do not overlap
        return Sum(terms) if blocks else refine(Sum(terms), dense)
    if isinstance(matrix, Product):
        return refine(matrix, dense)
    if isinstance(matrix, Placed):
        (row, column), (rows, columns) = matrix.offset, matrix.matrix.shape
        block = dense[row : row + rows, column : column + columns]
        return Placed(_nearest_like(matrix.matrix, block), matrix.shape, matrix.offset)
    if not isinstance(matrix, Family):
        raise UserError(f"a {type(matrix).__name__} is no family with a nearest matrix")
    return matrix.nearest(dense, **matrix.options())
