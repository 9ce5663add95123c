"""Several ways to compute `x @ (W + M)` for a frozen kernel W and a structured matrix M, equal up to rounding.

Which one is fastest depends on the family, the width, the number of tokens, the precision and the device:

- `fft` computes `x @ W + x @ M` by M's fast product, forward and backward. It works in every precision.
- `dense` forms M, an array of the size of the kernel. In float32 it multiplies `x` by one kernel `W + M`, so the output
  and the gradient of `x` cost as much as in the frozen layer. The gradient of a full kernel is computed and reduced to
  M's parameters. In half precision `x @ W` and `x @ M` are separate products, because an update below half a unit in
  the last place of W would vanish in `W + M`.
- `fused` works like `dense` in float32, but M's parameters get their gradient by the fast product, on one cache-sized
  piece of the tokens after another. It does not work in half precision.
- `auto` chooses the execution that was fastest in a similar measured case (`surm_jax.structured.products.choice`).

The derivative of the product with the kernel `W + M` is defined as a JVP, `dx @ (W + M) + x @ dM`, and JAX derives the
reverse mode by transposition. So both modes of differentiation work, and the gradient of the kernel is computed only if
it is needed. In all executions reverse mode stores only `x`, W and M's parameters; spectra and `W + M` are recomputed.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from surm_jax.devices.batch import batch_local
from surm_jax.errors import UserError, did_you_mean
from surm_jax.structured.base import StructuredMatrix
from surm_jax.structured.products.choice import choose

EXECUTIONS = ("auto", "fft", "dense", "fused")
"""The names of the executions, which the docstring of this module explains."""

PIECE_BYTES = 2**21
"""The size of the pieces of `x` in the fast product, so that spectra stay in cache; a CPU core has 1 or 2 MiB."""

Dot = Callable[[Float[Array, "*batch in"], Float[Array, "in out"]], Float[Array, "*batch out"]]
"""A product of inputs and kernel, such as `jnp.matmul`."""


def check_execution(execution: str) -> None:
    """Check that `execution` is one of `EXECUTIONS`.

    Raises:
        UserError: It is not; the message names the nearest one.
    """
    if execution not in EXECUTIONS:
        raise UserError(
            f"no execution is called {execution!r}{did_you_mean(str(execution), EXECUTIONS)} "
            f"(known: {', '.join(EXECUTIONS)})"
        )


def updated_matmul(
    x: Float[Array, "*batch in"],
    kernel: Float[Array, "in out"],
    update: StructuredMatrix,
    *,
    execution: str = "auto",
    dot: Dot = jnp.matmul,
) -> Float[Array, "*batch out"]:
    """Return `x @ (kernel + update)`.

    Args:
        x: Any number of leading dimensions, (..., in_features). On a mesh the first one is sharded. Each device then
            computes its part of the product with the update, and only the gradient of the update's parameters is
            summed over devices.
        kernel: (in_features, out_features), in the dtype of `x`.
        update: A structured matrix of the kernel's shape, in any dtype.
        execution: One of `EXECUTIONS`; see the module's docstring.
        dot: The product of `x` and a kernel, linear in both: `jnp.matmul`, or the same in another precision.

    Returns:
        (..., out_features) in the dtype of the result of `dot`.

    Raises:
        UserError: The shapes do not fit, `x` or the kernel is not real floating point, the execution is unknown, or it
            is `fused` in half precision.

    >>> from surm_jax.structured import Circulant
    >>> shift = Circulant(jnp.array([0.0, 1.0, 0.0]), shape=(3, 3))
    >>> updated_matmul(jnp.array([[1.0, 2.0, 3.0]]), 10 * jnp.eye(3), shift, execution="fused")
    Array([[13., 21., 32.]], dtype=float32)
    """
    check_execution(execution)
    if kernel.shape != update.shape or x.ndim == 0 or x.shape[-1] != update.shape[0]:
        raise UserError(
            f"updated_matmul: x (..., in), kernel (in, out) and update (in, out) do not fit: "
            f"{x.shape}, {kernel.shape} and {update.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise UserError(f"updated_matmul: x and kernel must be real floating point, not {x.dtype} and {kernel.dtype}")
    foldable = x.dtype == kernel.dtype and x.dtype in (jnp.float32, jnp.float64)
    if execution == "auto":
        execution = choose(update, math.prod(x.shape[:-1]), kernel.dtype)
        if execution == "fused" and not foldable:
            execution = "dense"
    if execution == "fused" and not foldable:
        raise UserError(
            f"the execution 'fused' adds the update to the kernel, and would lose it in {kernel.dtype}: "
            "choose fft or dense, or compute in float32"
        )
    product = _through_dense if execution == "dense" else _in_pieces
    if foldable and execution != "fft":
        return _folded(product, dot, x, kernel, update)
    y = dot(x, kernel)
    moved = _at_once(x, update) if execution == "fft" and update.small_residuals else product(dot, x, update)
    return y + moved.astype(y.dtype)


def matmul(
    x: Float[Array, "*batch in"], update: StructuredMatrix, *, execution: str = "auto", dot: Dot = jnp.matmul
) -> Float[Array, "*batch out"]:
    """Return `x @ update`, for an update whose input differs from the kernel's, such as an input after dropout.

    Args:
        x: (..., in_features).
        update: A structured matrix.
        execution: As in `updated_matmul`. Without a kernel, `fused` is the fast product in pieces.
        dot: As in `updated_matmul`.

    Returns:
        (..., out_features) in the dtype of `x`, or of the result of `dot`.

    Raises:
        UserError: The shapes do not fit, `x` is not real floating point, or the execution is unknown.
    """
    check_execution(execution)
    if x.ndim == 0 or x.shape[-1] != update.shape[0]:
        raise UserError(f"matmul: x (..., in) and update (in, out) do not fit: {x.shape} and {update.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"matmul: x must be real floating point, not {x.dtype}")
    if execution == "auto":
        execution = choose(update, math.prod(x.shape[:-1]), x.dtype)
    if execution == "fft" and update.small_residuals:
        return _at_once(x, update)
    return (_through_dense if execution == "dense" else _in_pieces)(dot, x, update)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _folded(product: Callable[..., Array], dot: Dot, x: Array, kernel: Array, update: StructuredMatrix) -> Array:
    """Return `dot(x, kernel + update)`. Only the derivative uses `product`, which computes `x @ update`."""
    del product
    return dot(x, _sum(kernel, update))


@functools.partial(_folded.defjvp, symbolic_zeros=True)
def _folded_jvp(product, dot, primals, tangents):
    x, kernel, update = primals
    dx, dkernel, dupdate = tangents
    y, terms = dot(x, _sum(kernel, update)), []
    if not isinstance(dx, SymbolicZero):
        # Checkpointed, so that the backward pass recomputes the sum instead of storing it.
        terms.append(jax.checkpoint(lambda dx, kernel, update: dot(dx, _sum(kernel, update)))(dx, kernel, update))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(dot(x, dkernel))
    if not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(dupdate)):
        dupdate = jax.tree.map(_instantiated, dupdate, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
        terms.append(jax.jvp(lambda update: product(dot, x, update), (update,), (dupdate,))[1].astype(y.dtype))
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


def _sum(kernel: Array, update: StructuredMatrix) -> Array:
    return kernel + update.to_dense().astype(kernel.dtype)


def _instantiated(tangent: Array | SymbolicZero) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if isinstance(tangent, SymbolicZero) else tangent


def _through_dense(dot: Dot, x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update` by its dense form. Each device reduces the gradient of this form to the parameters."""
    return batch_local(jax.checkpoint(lambda x, update: dot(x, update.to_dense().astype(x.dtype))))(x, update)


def _at_once(x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update` by one fast product, for an update with small residuals.

    For an `x` in half precision, reverse mode would store a float32 copy of it, so the product is recomputed instead.
    """
    if x.dtype == update._compute_dtype(x.dtype):
        return update.apply(x)
    return jax.checkpoint(lambda x, update: update.apply(x))(x, update)


def _in_pieces(dot: Dot, x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update` by the fast product, on one piece of the tokens after another."""
    del dot
    return batch_local(_apply_in_pieces)(x, update)


def _apply_in_pieces(x: Array, update: StructuredMatrix) -> Array:
    apply = jax.checkpoint(lambda x, update: update.apply(x))
    m, n = update.shape
    rows = x.reshape(-1, m)
    tokens, length = rows.shape[0], max(1, PIECE_BYTES // (m * x.dtype.itemsize))
    if tokens <= length:
        return apply(x, update)
    # A slightly shorter piece may divide the number of tokens and leave no remainder: these numbers have many divisors.
    length = next((size for size in range(length, length // 2, -1) if tokens % size == 0), length)
    whole = tokens - tokens % length
    y = jax.lax.map(lambda rows: apply(rows, update), rows[:whole].reshape(-1, length, m)).reshape(whole, n)
    if whole < tokens:
        y = jnp.concatenate([y, apply(rows[whole:], update)])
    return y.reshape(*x.shape[:-1], n)
