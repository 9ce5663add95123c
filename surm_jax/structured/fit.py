"""Refine a structured matrix towards a dense one by gradients, for families whose best approximation has no formula.

The approximation study of arXiv 2406.17740 fits `W(G, H)` by gradient descent. The objective has no noise and is a
polynomial of low degree, so L-BFGS reaches the same error in fewer steps, without a learning rate.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
import tqdm
from jaxtyping import Array, ArrayLike, Float, Int

from surm_jax.errors import UserError
from surm_jax.structured.base import StructuredMatrix, compute_dtype

# Steps between two updates of the progress bar: so few that the bar moves, so many that it costs almost nothing.
_PIECE = 25

Matrix = TypeVar("Matrix", bound=StructuredMatrix)
"""Any structured matrix; the refined matrix has the same class."""


def refine(start: Matrix, target: Float[ArrayLike, "in out"], *, steps: int = 200, progress: bool = False) -> Matrix:
    """Search from `start`, by L-BFGS, for parameters whose dense form is near `target`.

    Minimise `||target - M||_F^2 / ||target||_F^2` over all leaves with `optax.lbfgs` and its line search, and return
    the nearest matrix of the search. It is never further from the target than `start`, and in general a local minimum.
    The search stops early when the error no longer falls.

    Under `jax.jit` and `jax.vmap` the search is one compiled loop. A direct call compiles a loop of at most 25 steps
    once for each structure and shape, and repeats it. A leaf of zeros learns only if its gradient is not zero, so at
    least one factor of a product must start away from zero.

    Args:
        start: Any structured matrix.
        target: (in_features, out_features) of `start`. It may be all zeros.
        steps: Largest number of steps. Each step evaluates the dense form and its gradient once or a few times.
        progress: Whether to show a bar with the relative error `||target - M||_F / ||target||_F` of the best point so
            far. Inside a transformation of JAX no bar is shown.

    Returns:
        A matrix with the structure of `start`. Its leaves are float64 if the target or a leaf of `start` is float64,
        otherwise float32.

    Raises:
        UserError: The target has another shape or is not floating point, `steps` is not an integer of at least 0, or a
            number in the target or in `start` is not finite. Inside a transformation of JAX, numbers are not known: if
            some are not finite, `start` is returned.
    """
    target = jnp.asarray(target)
    if target.shape != tuple(start.shape) or not jnp.issubdtype(target.dtype, jnp.floating):
        raise UserError(
            f"refine: the target of a {type(start).__name__} must be a floating-point matrix of its shape "
            f"{tuple(start.shape)}, not {target.dtype} of shape {target.shape}"
        )
    if not isinstance(steps, int) or steps < 0:
        raise UserError(f"refine: steps must be an integer of at least 0, not {steps!r}")
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, start))
    dtype = compute_dtype(target.dtype, *(leaf.dtype for leaf in leaves))
    leaves, target = [leaf.astype(dtype) for leaf in leaves], target.astype(dtype)
    traced = any(isinstance(array, jax.core.Tracer) for array in (target, *leaves))
    if not traced:
        for what, array in (("the target", target), *((f"a leaf of {start!r}", leaf) for leaf in leaves)):
            if not jnp.all(jnp.isfinite(array)):
                raise UserError(f"refine: {what} holds numbers that are not finite")
    if steps == 0:
        return jax.tree.unflatten(structure, leaves)
    search = _begin(leaves, target, structure=structure)
    if traced:
        return _best(_advance(search, target, jnp.int32(steps), structure=structure), structure)
    with tqdm.tqdm(desc=f"refining {type(start).__name__}", total=steps, unit="step", disable=not progress) as bar:
        for done in range(0, steps, _PIECE):
            error, count = search.error, min(_PIECE, steps - done)
            search = _advance(search, target, jnp.int32(count), structure=structure)
            bar.set_postfix(relative_error=f"{float(search.error) ** 0.5:.3g}")
            bar.update(count)
            if search.error >= error:
                break
    return _best(search, structure)


class _Search(NamedTuple):
    """State of a search: its point, the optimiser's memory, and the best point so far with its squared error.

    Points are leaves divided by `unit`, the size of the largest number in `start`, because the optimiser's first steps
    are of order 1.
    """

    point: list[Array]
    memory: optax.OptState
    best: list[Array]
    error: Float[Array, ""]
    unit: Float[Array, ""]


_OPTIMIZER = optax.lbfgs()


@functools.partial(jax.jit, static_argnames="structure")
def _begin(leaves: list[Array], target: Float[Array, "in out"], *, structure: jax.tree_util.PyTreeDef) -> _Search:
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    # The unit is a power of two, so that leaves that do not move are returned bit for bit.
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1]), 1)
    point = [leaf / unit for leaf in leaves]
    # optax creates some numbers in the default type, which under x64 is wider than single-precision leaves, and some
    # weakly typed, with which the second call of `_advance` would compile again.
    memory = jax.tree.map(
        lambda x: x.astype(target.dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), _OPTIMIZER.init(point)
    )
    return _Search(point, memory, point, _objective(target, unit, structure)(point), unit)


@functools.partial(jax.jit, static_argnames="structure")
def _advance(
    search: _Search, target: Float[Array, "in out"], steps: Int[Array, ""], *, structure: jax.tree_util.PyTreeDef
) -> _Search:
    objective = _objective(target, search.unit, structure)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def unfinished(loop: tuple[Array, _Search]) -> Array:
        step, search = loop
        # A squared error below the square of the machine epsilon is only rounding noise.
        return (step < steps) & (search.error > jnp.finfo(target.dtype).eps ** 2)

    def step(loop: tuple[Array, _Search]) -> tuple[Array, _Search]:
        step, search = loop
        value, grad = value_and_grad(search.point, state=search.memory)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer types under x64
            move, memory = _OPTIMIZER.update(
                grad, search.memory, search.point, value=value, grad=grad, value_fn=objective
            )
        memory = jax.tree.map(lambda new, old: new.astype(old.dtype), memory, search.memory)
        point = optax.apply_updates(search.point, move)
        # The line search has evaluated the new point. Comparisons with NaN are false, so such a point is never best.
        error = optax.tree.get(memory, "value")
        better = error < search.error
        best = [jnp.where(better, new, old) for new, old in zip(point, search.best, strict=True)]
        return step + 1, _Search(point, memory, best, jnp.where(better, error, search.error), search.unit)

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), search))[1]


def _best(search: _Search, structure: jax.tree_util.PyTreeDef) -> Any:
    return jax.tree.unflatten(structure, [search.unit * leaf for leaf in search.best])


def _objective(
    target: Float[Array, "in out"], unit: Float[Array, ""], structure: jax.tree_util.PyTreeDef
) -> Callable[[list[Array]], Float[Array, ""]]:
    """Return the squared relative error as a function of the leaves divided by their unit."""
    # The plain sum of squares would underflow for small targets.
    size = jnp.max(jnp.abs(target))
    size = jnp.where(size > 0, size * jnp.linalg.norm(target / jnp.where(size > 0, size, 1)), 1)

    def objective(point: list[Array]) -> Float[Array, ""]:
        matrix = jax.tree.unflatten(structure, [unit * leaf for leaf in point])
        return jnp.sum(jnp.square((target - matrix.to_dense()) / size))

    return objective
