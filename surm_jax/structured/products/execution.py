"""Several ways to compute `x @ (W + M)` for a frozen kernel W and a structured matrix M, equal to rounding.

Which one is fastest depends on the family, the width, the number of tokens, the precision and the device:

- `fft`: `x @ W + x @ M` by M's fast product, forward and backward. Works in every precision.
- `dense`: M is formed, an array of the kernel's size beside the far larger activations. In float32 `W + M` is one
  kernel, so that output and input gradient cost what the frozen layer costs; M's gradient is that of a full kernel,
  reduced to M's parameters. In half precision W and M stay apart, since an update below half a unit in the last place
  of W would vanish in their sum.
- `fused`: as `dense` in float32, but M's parameters get their gradient by the fast product, one cache-sized piece of
  the tokens after the other. Not in half precision.
- `auto`: what was measured to be fastest in a similar case (`surm_jax.structured.products.choice`).

The derivative of the folded product is stated as a JVP, `dx @ (W + M) + x @ dM`, of which JAX makes the reverse mode by
transposition: both directions of differentiation work, and a kernel that nobody asks a gradient of has none. Of all
executions reverse mode keeps `x` alone, beside W and M's parameters; spectra and `W + M` are computed again.
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
"""The ways to compute, by the names under which the docstring of this module explains them."""

PIECE_BYTES = 2**21
"""How much of `x` the fast product works on at a time. Its spectra then stay in cache; a CPU core has 1 or 2 MiB."""

Dot = Callable[[Float[Array, "*batch in"], Float[Array, "in out"]], Float[Array, "*batch out"]]
"""A product of inputs and kernel, such as `jnp.matmul`."""


def check_execution(execution: str) -> None:
    """Checks that `execution` is one of `EXECUTIONS`.

    Raises:
        UserError: It is something else; the message names the nearest one.
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
    """`x @ (kernel + update)`.

    Args:
        x: Any number of leading dimensions, (..., in_features). Over a mesh the first of them is sharded, and what is
            computed of the update stays local to its devices; only the gradient of its parameters is summed over them.
        kernel: (in_features, out_features), in the dtype of `x`.
        update: A structured matrix of the kernel's shape, in any dtype.
        execution: One of `EXECUTIONS`; see the module's docstring.
        dot: How `x` is multiplied with a kernel: `jnp.matmul`, or one with another precision. Linear in both.

    Returns:
        (..., out_features) in the dtype that `dot` gives.

    Raises:
        UserError: The shapes do not fit, the execution is unknown, or it is `fused` in half precision.

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
    """`x @ update` alone, for an update that reads another input than the kernel, such as one after dropout.

    Args:
        x: (..., in_features).
        update: A structured matrix.
        execution: As in `updated_matmul`; `fused` has nothing to be fused with, and is the fast product in pieces.
        dot: As in `updated_matmul`.

    Returns:
        (..., out_features) in the dtype of `x`, or that which `dot` gives.

    Raises:
        UserError: The shapes do not fit, or the execution is unknown.
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
    """`dot(x, kernel + update)`. How `x @ update` is computed, `product`, shows in the derivative alone."""
    del product
    return dot(x, _sum(kernel, update))


@functools.partial(_folded.defjvp, symbolic_zeros=True)
def _folded_jvp(product, dot, primals, tangents):
    x, kernel, update = primals
    dx, dkernel, dupdate = tangents
    y, terms = dot(x, _sum(kernel, update)), []
    if not isinstance(dx, SymbolicZero):
        # Checkpointed, so that the sum is formed again in the backward pass and is not kept for it.
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
    """`x @ update` with the matrix formed; the gradient of the matrix is reduced to its parameters on each device."""
    return batch_local(jax.checkpoint(lambda x, update: dot(x, update.to_dense().astype(x.dtype))))(x, update)


def _at_once(x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update` by a product with small residuals.

    For an `x` in half precision, reverse mode would keep a float32 copy of it; then the product is computed again.
    """
    if x.dtype == update._compute_dtype(x.dtype):
        return update.apply(x)
    return jax.checkpoint(lambda x, update: update.apply(x))(x, update)


def _in_pieces(dot: Dot, x: Array, update: StructuredMatrix) -> Array:
    """`x @ update` by the fast product, on one piece of the tokens after the other."""
    del dot
    return batch_local(_apply_in_pieces)(x, update)


def _apply_in_pieces(x: Array, update: StructuredMatrix) -> Array:
    apply = jax.checkpoint(lambda x, update: update.apply(x))
    m, n = update.shape
    rows = x.reshape(-1, m)
    tokens, length = rows.shape[0], max(1, PIECE_BYTES // (m * x.dtype.itemsize))
    if tokens <= length:
        return apply(x, update)
    # A somewhat shorter piece that divides the tokens leaves no rest, and batch times length has many divisors.
    length = next((size for size in range(length, length // 2, -1) if tokens % size == 0), length)
    whole = tokens - tokens % length
    y = jax.lax.map(lambda rows: apply(rows, update), rows[:whole].reshape(-1, length, m)).reshape(whole, n)
    if whole < tokens:
        y = jnp.concatenate([y, apply(rows[whole:], update)])
    return y.reshape(*x.shape[:-1], n)
