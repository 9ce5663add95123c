"""Building blocks that all transformers of this package share: attention, MLP, activations, dropout, rematerialisation.

Parameters have the dtype `param_dtype`. The computation has the dtype `dtype`, except for the softmax, which is always
computed in float32.

The suffix of a variable's name gives its dimensions, for example `x_btd`: b batch, t tokens, d width of the model, m
width of the MLP's hidden layer, n heads, k width of one head.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the exact GELU, `x (1 + erf(x / sqrt 2)) / 2` (arXiv 1606.08415).

    PyTorch uses the same formula. `jax.nn.gelu` instead uses `erfc`, which is also accurate for very negative `x`, but
    is slower on a CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `x sigmoid(1.702 x)`, the approximation of GELU that CLIP uses (arXiv 1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


_XAVIER = nnx.initializers.xavier_uniform()
_TINY = nnx.initializers.normal(stddev=1e-6)

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
        "gelu": gelu,
        "quick_gelu": quick_gelu,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
)
"""Activation functions of the MLP, by their names in configurations. "gelu" is the exact GELU, which uses the error
function, and "gelu_tanh" is its approximation with tanh."""


class RMSNorm(nnx.Module):
    """The norm `x / sqrt(mean(x^2) + epsilon) * (offset + scale)` over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, *, epsilon: float, offset: float = 0.0, param_dtype: DTypeLike):
        self.epsilon, self.offset = epsilon, offset
        self.scale = nnx.Param(jnp.full((width,), 1 - offset, param_dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the normalised array in the dtype of `x`. The computation is in float32."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (y * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rotate(x_btnk: Float[Array, "b t n k"], turns: Float[Array, "2 #b t half"] | None) -> Float[Array, "b t n k"]:
    """Turn queries or keys by their rotary positions (arXiv 2104.09864). The computation is in float32.

    Args:
        x_btnk: The heads of queries or keys. Their features i and i + k / 2 are the coordinates of a point.
        turns: The cosines and sines of the angles by which the points of each token are turned. None: no turns.
    """
    if turns is None:
        return x_btnk
    first, second = jnp.split(x_btnk.astype(jnp.float32), 2, axis=-1)
    cos, sin = turns[:, :, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_btnk.dtype)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Return `cap tanh(x / cap)`, which lies between -cap and cap. If `cap` is 0, return `x`."""
    return cap * jnp.tanh(x / cap) if cap else x


def tied_logits(embed: nnx.Embed, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """Return the products of `x` and all embeddings of a vocabulary in float32, for a head that shares them.

    The factors are in the dtype of `x`, and the sums are in float32. A subclass, such as that of an adapted layer, may
    multiply by more than its table, so it computes the products by its own `attend`.
    """
    if type(embed) is not nnx.Embed:
        return embed.attend(x).astype(jnp.float32)
    table_vd = embed.embedding[...].astype(x.dtype)
    return jnp.einsum("...d,vd->...v", x, table_vd, preferred_element_type=jnp.float32)


class Attention(nnx.Module):
    """Multi-head self-attention (arXiv 1706.03762).

    Every head computes `softmax(Q K^T / sqrt(k)) V` (equation 1) from its queries Q, keys K and values V.
    The four projections are the submodules `query`, `key`, `value` and `out`. An adapter can replace each of them by
    another module, because this class only calls them and does not read their parameters. The kernels of `query`, `key`
    and `value` have the shape (d, n, k), and the kernel of `out` has the shape (n, k, d), with d features, n heads and
    k = d / n features in each head.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        kernel_init: nnx.initializers.Initializer = _XAVIER,
        rngs: nnx.Rngs,
    ):
        heads_shape = (heads, width // heads)
        options: dict[str, Any] = {
            "dtype": jnp.dtype(dtype),
            "param_dtype": jnp.dtype(param_dtype),
            "kernel_init": kernel_init,
            "rngs": rngs,
        }
        self.query = nnx.LinearGeneral(width, heads_shape, use_bias=qkv_bias, **options)
        self.key = nnx.LinearGeneral(width, heads_shape, use_bias=qkv_bias, **options)
        self.value = nnx.LinearGeneral(width, heads_shape, use_bias=qkv_bias, **options)
        self.out = nnx.LinearGeneral(heads_shape, width, axis=(-2, -1), use_bias=out_bias, **options)

    def __call__(
        self, x_btd: Float[Array, "b t d"], mask_bt: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Return the output of attention for every token. The cost is `O(t d^2 + t^2 d)` for each sequence.

        Args:
            x_btd: The features of the tokens.
            mask_bt: True for the tokens that queries attend to, and False for tokens that are ignored, such as padding.
                With None, queries attend to all tokens.
        """
        q_btnk, k_btnk, v_btnk = self.query(x_btd), self.key(x_btd), self.value(x_btd)
        mask_bnts = None if mask_bt is None else mask_bt[:, None, None, :]
        # jax.nn.dot_product_attention promotes bfloat16 with float32, which raises an error under strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            y_btnk = jax.nn.dot_product_attention(q_btnk, k_btnk, v_btnk, mask=mask_bnts)
        return self.out(y_btnk)


class MLP(nnx.Module):
    """Two dense layers with an activation function between them, which are applied to each token.

    The module maps an array x of shape (b, t, d) to `activation(x U + u) D + e`. U and u are the kernel and bias of the
    submodule `up`, and D and e those of `down`.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        activation: str,
        dropout: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        kernel_init: nnx.initializers.Initializer = _XAVIER,
        bias_init: nnx.initializers.Initializer = _TINY,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {
            "dtype": jnp.dtype(dtype),
            "param_dtype": jnp.dtype(param_dtype),
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        self.activation = activation
        self.up = nnx.Linear(width, hidden_width, **options)
        self.down = nnx.Linear(hidden_width, width, **options)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x_btd: Float[Array, "b t d"], key: jax.Array | None) -> Float[Array, "b t d"]:
        """Return the output of the two layers.

        Args:
            x_btd: The features of the tokens.
            key: The random key of the dropout between the layers. None turns dropout off.
        """
        hidden_btm = ACTIVATIONS[self.activation](self.up(x_btd))
        return self.down(drop(self.dropout, hidden_btm, key))


REMAT: Mapping[str, Callable[..., bool] | None] = MappingProxyType(
    {
        "none": None,
        "block": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
)
"""Rematerialisation policies by name. A policy says which intermediate results of a block the forward pass stores, and
which ones the backward pass computes again (arXiv 1604.06174).

"none" stores all intermediate results. "block" stores only the inputs of each block. Then only one block at a time has
its intermediate results in memory, and a training step costs about a third more. "dots" stores the outputs of the dense
layers. It computes the attention scores and the activation functions again, which costs little.
"""


class Blocks(nnx.List):
    """The list of a model's transformer blocks. Each block takes the output of the previous block as its input."""

    def run(self, x: Any, *arguments: Any, keys: jax.Array | None, remat: str, every: bool) -> tuple[Any, ...]:
        """Call all blocks one after another, and return their outputs.

        Args:
            x: The input of the first block, an array or a pytree of arrays. Every block returns the same with equal
                shapes and dtypes.
            *arguments: More arguments that every block gets, such as an attention mask. They are pytrees of arrays.
            keys: One random key for each block, which is passed as the last argument of the block. With None, the last
                argument of every block is None.
            remat: Name of the rematerialisation policy, one of `REMAT`.
            every: If true, return `x` and the outputs of all blocks. If false, return a tuple that holds only the
                output of the last block.
        """
        states = [x]
        for index, block in enumerate(self):
            key = None if keys is None else keys[index]
            states.append(call_block(block, states[-1], *arguments, key, policy=REMAT[remat]))
        return tuple(states if every else states[-1:])

    def between(self, first: int, last: int | None) -> "Blocks":
        """Return the blocks with the indices `first` to `last - 1`, or to the end if `last` is None.

        The blocks are shared with this list.
        """
        return Blocks(self[first:last])


TARGETS: Mapping[str, str] = MappingProxyType(
    {
        "qkv": r"blocks/\d+/attention/(query|key|value)",
        "qv": r"blocks/\d+/attention/(query|value)",
        "attention": r"blocks/\d+/attention/(query|key|value|out)",
        "mlp": r"blocks/\d+/mlp/(up|down)",
        "houlsby": r"blocks/\d+/(attention|mlp)",
        "pfeiffer": r"blocks/\d+/mlp",
        "all-linear": r"blocks/\d+/(attention/(query|key|value|out)|mlp/(up|down))",
    }
)
"""Names for common choices of modules to adapt, and the regular expressions that match the paths of these modules.

"houlsby" and "pfeiffer" are for the adapter methods of these authors, which put an adapter after a whole module.
"houlsby" selects the attention and the MLP of every block, and "pfeiffer" only the MLP. The other names select single
dense layers. The regular expressions are for models that consist of the layers in this file.
"""


def dropout_key(rngs: nnx.Rngs | jax.Array | None) -> jax.Array | None:
    """Return the random key of dropout that a caller passes as a key or as an `nnx.Rngs`, or None for no dropout."""
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs


def split_key(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """Split a random key into a tuple of `count` independent keys. Return `count` times None if `key` is None."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def split_block_keys(key: jax.Array | None, depth: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Split a random key into those of a model with `depth` blocks.

    Returns:
        A key for the dropout after the embeddings, and an array of `depth` keys for the blocks. If `key` is None, both
        are None.
    """
    if key is None:
        return None, None
    keys = jax.random.split(key, depth + 1)
    return keys[0], keys[1:]


def drop(dropout: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Apply dropout with the given random key to `x`. Without a key, return `x` unchanged."""
    return dropout(x, deterministic=key is None, rngs=key)


def call_block(
    block: nnx.Module,
    *arguments: Any,
    policy: Callable[..., bool] | None,
    call: Callable[..., Any] = lambda block, *arguments: block(*arguments),
) -> Any:
    """Return `call(block, *arguments)`, with a rematerialisation policy for the backward pass.

    The policy trades memory against time, and does not change the result.

    Args:
        block: The block. It must not change its own state when it is called.
        *arguments: The arguments of the block.
        policy: The policy, such as a value of `REMAT`.
        call: How the block is called. The default calls it with the arguments.
    """
    if policy is None:
        return call(block, *arguments)
    graphdef, state = nnx.split(block)
    pure = jax.checkpoint(lambda state, arguments: call(nnx.merge(graphdef, state), *arguments), policy=policy)
    return pure(state, arguments)
