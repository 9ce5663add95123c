"""Several ways ("executions") to compute `x @ (W + M)` for a frozen kernel W and a structured matrix M.

The results are equal up to rounding. The fastest execution depends on the family of M, the width of the layer, the
number of tokens, the dtype and the device:

- `fft` computes `x @ W + x @ M`. For `x @ M` and its gradients it uses the fast product of the family of M, often an
  FFT, and never forms the dense matrix M. It works in every dtype.
- `dense` forms M as a dense array of the shape of W. In float32 and float64 it multiplies `x` by the single kernel
  `W + M`, so the output and the gradient of `x` cost about as much as in a layer without M. For the gradient of M's
  parameters it computes the gradient of the dense M and reduces it to the parameters. In half precision (bfloat16 and
  float16) `x @ W` and `x @ M` are separate products. There, an entry of M that is much smaller than the entry of W
  would be lost by rounding in `W + M`.
- `fused` computes the output and the gradient of `x` like `dense`. It computes the gradient of M's parameters by the
  fast product of the family. It divides the tokens into chunks and processes these one after another, so that the
  intermediate arrays of a chunk stay in the cache of a CPU. It does not work in half precision.
- `auto` chooses the execution that was fastest in a similar measured case (`surm_jax.structured.products.choice`).

If several layers multiply the same `x`, such as the queries, keys and values of attention, XLA computes the Fourier
transform of `x` once for all of them, as long as `x` is a single chunk.

The derivative of `x @ (W + M)` is defined as a JVP, from which JAX derives the reverse mode by transposition. So both
modes work, and the gradient of W is computed only if it is needed. For the backward pass, reverse mode stores `x`, W,
M's parameters, and for some families a few arrays that are much smaller than `x`. It computes `W + M` and the Fourier
transforms again.
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
"""Names of the executions. The docstring of this module explains them."""

PIECE_BYTES = {"cpu": 2**21}
"""Largest size in bytes of the chunks of tokens into which the fast product divides `x`, by JAX backend.

On a CPU, a chunk is so small that its Fourier transforms stay in the cache of a core, which has 1 or 2 MiB. Other
backends are slow with small arrays. There, a chunk has up to `LARGE_PIECE_BYTES`, which limit the temporary memory.
"""

LARGE_PIECE_BYTES = 2**28

Dot = Callable[[Float[Array, "*batch in"], Float[Array, "in out"]], Float[Array, "*batch out"]]
"""Type of a function that multiplies inputs by a dense kernel, such as `jnp.matmul`."""


def check_execution(execution: str) -> None:
    """Check that `execution` is one of `EXECUTIONS`.

    Raises:
        UserError: The name is not one of `EXECUTIONS`. The message suggests the nearest name.
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
    vectors: Callable[[Array], Array] = lambda x: x,
    outputs: Callable[[Array], Array] = lambda y: y,
) -> Float[Array, "*batch out"]:
    """Return `x @ (kernel + update)`.

    The inputs and outputs of `dot` may have another form than vectors, such as images for a convolution. Then
    `dot(x, kernel)` must equal `outputs(vectors(x) @ kernel)`.

    Args:
        x: Array of shape (..., in_features), with any number of leading dimensions. If its first dimension is sharded
            over a device mesh, each device computes the product of its own part of `x` with the update. For this
            product, the devices exchange nothing but the gradient of the update's parameters, which they sum.
        kernel: Array of shape (in_features, out_features), usually in the dtype of `x`.
        update: Structured matrix of the same shape as the kernel, in any dtype.
        execution: One of `EXECUTIONS`, which the docstring of the module explains.
        dot: Function that multiplies `x` by a dense kernel and is linear in both arguments. For example, it may be
            `jnp.matmul` with another value of its argument `precision`.
        vectors: Linear function that returns the inputs as vectors, of shape (..., in_features).
        outputs: Linear function that returns vectors of shape (..., out_features) in the form of the result of `dot`.

    Returns:
        An array of the shape and dtype of the result of `dot`.

    Raises:
        UserError: The shapes do not fit, `x` or the kernel is not real floating point, the execution is unknown, or the
            execution is `fused` and the dtypes of `x` and kernel are not both float32 or both float64.

    In the example, the update shifts the entries of x by one place to the right, to 3, 1, 2, and the kernel multiplies
    x by 10.

    >>> from surm_jax.structured import Circulant
    >>> shift = Circulant(jnp.array([0.0, 1.0, 0.0]), shape=(3, 3))
    >>> updated_matmul(jnp.array([[1.0, 2.0, 3.0]]), 10 * jnp.eye(3), shift, execution="fused")
    Array([[13., 21., 32.]], dtype=float32)
    """
    check_execution(execution)
    rows = jax.eval_shape(vectors, x).shape
    if kernel.shape != update.shape or not rows or rows[-1] != update.shape[0]:
        raise UserError(
            f"updated_matmul: x (..., in), kernel (in, out) and update (in, out) do not fit: "
            f"{rows}, {kernel.shape} and {update.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise UserError(f"updated_matmul: x and kernel must be real floating point, not {x.dtype} and {kernel.dtype}")
    foldable = x.dtype == kernel.dtype and x.dtype in (jnp.float32, jnp.float64)
    if execution == "auto":
        execution = choose(update, math.prod(rows[:-1]), kernel.dtype)
        # Fast products, such as FFTs, need whole vectors. A device that has a part of each multiplies by its rows of M.
        if (execution == "fused" and not foldable) or jax.typeof(x).sharding.spec[-1] is not None:
            execution = "dense"
    if execution == "fused" and not foldable:
        raise UserError(
            f"the execution 'fused' adds the update to the kernel, and would lose it in {kernel.dtype}: "
            "choose fft or dense, or compute in float32"
        )
    product: Callable[[Array, StructuredMatrix], Array] = functools.partial(_through_dense, dot)
    if execution != "dense":
        fast = _at_once if execution == "fft" and update.small_residuals else _in_pieces
        product = lambda x, update: outputs(fast(vectors(x), update))  # noqa: E731
    if foldable and execution != "fft":
        return _folded(product, dot, x, kernel, update)
    y = dot(x, kernel)
    return y + product(x, update).astype(y.dtype)


def matmul(
    x: Float[Array, "*batch in"], update: StructuredMatrix, *, execution: str = "auto", dot: Dot = jnp.matmul
) -> Float[Array, "*batch out"]:
    """Return `x @ update`, the product with a structured matrix, without a frozen kernel.

    Use it for layers in which the kernel and the update multiply different arrays. For example, the kernel may multiply
    `x`, and the update `x` after dropout.

    Args:
        x: Array of shape (..., in_features).
        update: Structured matrix of shape (in_features, out_features).
        execution: One of `EXECUTIONS`. With `fused`, the fast product of the family is computed in chunks of tokens,
            one after another. Nothing is fused, because there is no kernel to which the update could be added.
        dot: Function that multiplies `x` by the dense form of the update. Only the execution `dense` uses it.

    Returns:
        An array of shape (..., out_features), in the dtype of `x`, or for `dense` in the dtype of the result of `dot`.

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
    if execution == "dense":
        return _through_dense(dot, x, update)
    return (_at_once if execution == "fft" and update.small_residuals else _in_pieces)(x, update)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _folded(product: Callable[..., Array], dot: Dot, x: Array, kernel: Array, update: StructuredMatrix) -> Array:
    """Return `dot(x, kernel + update)`, with the JVP that `_folded_jvp` defines.

    Args:
        product: Function of `x` and `update` that returns `x @ update`. Only the JVP calls it, to differentiate with
            respect to the parameters of the update.
        dot: Function that multiplies `x` by a dense kernel.
        x: Array of shape (..., in_features).
        kernel: The frozen kernel.
        update: Structured matrix of the same shape as the kernel.
    """
    del product
    return dot(x, _sum(kernel, update))


@functools.partial(_folded.defjvp, symbolic_zeros=True)
def _folded_jvp(product, dot, primals, tangents):
    x, kernel, update = primals
    dx, dkernel, dupdate = tangents
    y, terms = dot(x, _sum(kernel, update)), []
    if not isinstance(dx, SymbolicZero):
        # With `jax.checkpoint` the backward pass computes `kernel + update` again instead of storing it.
        terms.append(jax.checkpoint(lambda dx, kernel, update: dot(dx, _sum(kernel, update)))(dx, kernel, update))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(dot(x, dkernel))
    if not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(dupdate)):
        dupdate = jax.tree.map(_instantiated, dupdate, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
        terms.append(jax.jvp(lambda update: product(x, update), (update,), (dupdate,))[1].astype(y.dtype))
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


def _sum(kernel: Array, update: StructuredMatrix) -> Array:
    return kernel + update.to_dense().astype(kernel.dtype)


def _instantiated(tangent: Array | SymbolicZero) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if isinstance(tangent, SymbolicZero) else tangent


def _through_dense(dot: Dot, x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update`, computed with the dense form of the update.

    On a mesh, each device reduces the gradient of the dense form for its own part of `x` to that of the parameters, so
    that the devices sum only the small gradient.
    """
    return batch_local(jax.checkpoint(lambda x, update: dot(x, update.to_dense().astype(x.dtype))))(x, update)


def _at_once(x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update`, computed by the fast product of the family for all tokens at once.

    It is for updates whose product stores little for the backward pass (`StructuredMatrix.small_residuals`). If `x` is
    in half precision, the product is computed again in the backward pass (`jax.checkpoint`), because it would store `x`
    in float32.
    """
    if x.dtype == update._compute_dtype(x.dtype):
        return update.apply(x)
    return jax.checkpoint(lambda x, update: update.apply(x))(x, update)


def _in_pieces(x: Array, update: StructuredMatrix) -> Array:
    """Return `x @ update`, computed by the fast product of the family in chunks of tokens, one after another.

    A chunk of `x` has at most as many bytes as `PIECE_BYTES` says, but at least one token. The backward pass computes
    the product of each chunk again.
    """
    return batch_local(_apply_in_pieces)(x, update)


def _apply_in_pieces(x: Array, update: StructuredMatrix) -> Array:
    apply = jax.checkpoint(lambda x, update: update.apply(x))
    m, n = update.shape
    rows = x.reshape(-1, m)
    piece = PIECE_BYTES.get(jax.default_backend(), LARGE_PIECE_BYTES)
    tokens, length = rows.shape[0], max(1, piece // (m * x.dtype.itemsize))
    if tokens <= length:
        return apply(x, update)
    # Look for a chunk length that divides the number of tokens and is more than half of the longest one. Then there is
    # no shorter last chunk, which would need its own product. Such a length usually exists, because numbers of tokens
    # usually have many divisors.
    length = next((size for size in range(length, length // 2, -1) if tokens % size == 0), length)
    whole = tokens - tokens % length
    y = jax.lax.map(lambda rows: apply(rows, update), rows[:whole].reshape(-1, length, m)).reshape(whole, n)
    if whole < tokens:
        y = jnp.concatenate([y, apply(rows[whole:], update)])
    return y.reshape(*x.shape[:-1], n)
