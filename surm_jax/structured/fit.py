"""Search for the matrix of a family nearest to a dense matrix, for families in which no formula gives it.

The search is L-BFGS. The error has no noise and is a polynomial of low degree in the parameters, so L-BFGS needs fewer
steps than the gradient descent with which arXiv 2406.17740 fits its matrices `W(G, H)` (`LowDisplacementRank`), and no
learning rate.
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

# Number of steps between two updates of the progress bar: small enough that the bar moves visibly, and large enough
# that the updates cost almost nothing.
_PIECE = 25

Matrix = TypeVar("Matrix", bound=StructuredMatrix)
"""The class of the start of a search, which is also the class of its result."""


def refine(start: Matrix, target: Float[ArrayLike, "in out"], *, steps: int = 200, progress: bool = False) -> Matrix:
    """Return a structured matrix near `target`, found by an L-BFGS search that starts at `start`.

    The search minimises `||target - M||_F^2 / ||target||_F^2` over all array leaves with `optax.lbfgs` and its line
    search. The result is the nearest matrix that the search has visited. It is never further from the target than
    `start`, and in general it is a local minimum. The search ends early when its error is only rounding noise. Outside
    transformations of JAX, such as `jax.jit` and `jax.vmap`, it also ends when 25 steps have not reduced the error.

    Inside a transformation the search is one compiled loop. Outside, the function compiles a loop of at most 25 steps,
    once for each structure and shape, and calls it repeatedly.

    A leaf that is zero changes only if its gradient is not zero. The gradient of a factor of a product is zero if
    another factor is zero, so at most one factor of `start` should be zero.

    Args:
        start: The structured matrix from which the search starts.
        target: The dense matrix to approximate, of the shape of `start`. It may be all zeros.
        steps: Largest number of steps. Each step evaluates the dense form and its gradient once or a few times.
        progress: Whether to show a progress bar with the relative error `||target - M||_F / ||target||_F` of the best
            matrix so far. Inside a transformation of JAX no bar is shown.

    Returns:
        A matrix with the structure of `start`. Its leaves are float64 if the target or a leaf of `start` is float64,
        otherwise float32.

    Raises:
        UserError: The target has another shape or is not floating point, `steps` is not an integer of at least 0, or a
            number in the target or in `start` is not finite. Inside a transformation of JAX the values are traced and
            cannot be checked. If some are not finite there, the result is `start`.
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
    """State of a search, which every step of the compiled loop updates.

    The optimiser works on scaled leaves, which are the array leaves of the matrix divided by `unit`. So they are about
    as large as the first steps of the optimiser, which are of order 1.

    Attributes:
        point: The current scaled leaves.
        memory: The state of the optax optimiser.
        best: The scaled leaves with the smallest error so far.
        error: The squared relative error of `best`.
        unit: The smallest power of two above the largest absolute value in `start`, or 1 if this value is zero or not
            finite.
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
    # Division by a power of two is exact, so leaves that the search does not change are returned bit for bit.
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1]), 1)
    point = [leaf / unit for leaf in leaves]
    # optax creates some arrays in the default dtype, which under x64 is wider than float32 leaves. Others have weak
    # types, for which the second call of `_advance` would be compiled again.
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
        # The state of the optimiser holds the error of the new point, which the line search has evaluated. A comparison
        # with NaN is false, so a point whose error is NaN never becomes the best.
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
    """Return the function that a search minimises: the squared relative error for scaled leaves (`_Search`)."""
    # `size` becomes the Frobenius norm of the target, or 1 for a zero target. The entries are divided by the largest
    # one before they are squared, because the squares of small entries would underflow.
    size = jnp.max(jnp.abs(target))
    size = jnp.where(size > 0, size * jnp.linalg.norm(target / jnp.where(size > 0, size, 1)), 1)

    def objective(point: list[Array]) -> Float[Array, ""]:
        matrix = jax.tree.unflatten(structure, [unit * leaf for leaf in point])
        return jnp.sum(jnp.square((target - matrix.to_dense()) / size))

    return objective
