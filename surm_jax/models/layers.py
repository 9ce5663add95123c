"""Building blocks of all transformers: attention, MLP, activations, dropout and rematerialisation.

Parameters have `param_dtype`, the computation has `dtype`, and the softmax is always float32.
Suffixes of local names: b batch, t tokens, d width, m width inside the MLP, n heads, k width of a head.
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

    This is the formula of PyTorch. `jax.nn.gelu` uses `erfc`, which is also exact in the far tail, but slower on a CPU.
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
    }
)
"""Activations of the MLP by name. "gelu" is exact: it uses the error function."""


class Attention(nnx.Module):
    """Multi-head self-attention, `softmax(Q K^T / sqrt(k)) V` for every head (arXiv 1706.03762, equation 1).

    The four projections are called as modules, so an adapter on one of them changes the model. The kernels of `query`,
    `key` and `value` have shape (d, n, k), the kernel of `out` has (n, k, d).
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
            x_btd: The tokens.
            mask_bt: True for tokens to attend to; `None` attends to all tokens.
        """
        q_btnk, k_btnk, v_btnk = self.query(x_btd), self.key(x_btd), self.value(x_btd)
        mask_bnts = None if mask_bt is None else mask_bt[:, None, None, :]
        # jax.nn queries how bfloat16 and float32 promote; under strict promotion even the query raises an error.
        with jax.numpy_dtype_promotion("standard"):
            y_btnk = jax.nn.dot_product_attention(q_btnk, k_btnk, v_btnk, mask=mask_bnts)
        return self.out(y_btnk)


class MLP(nnx.Module):
    """Two layers, `activation(x U + u) D + d`, that are applied to each token; `(b, t, d) -> (b, t, d)`."""

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
        """Apply the two layers; `key` is the random key of the dropout between them, and `None` turns it off."""
        hidden_btm = ACTIVATIONS[self.activation](self.up(x_btd))
        return self.down(drop(self.dropout, hidden_btm, key))


REMAT: Mapping[str, Callable[..., bool] | None] = MappingProxyType(
    {
        "none": None,
        "block": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
)
"""Rematerialisation policies: what a block keeps for its gradient, and what it recomputes (arXiv 1604.06174).

"none" keeps everything. "block" keeps only the block's input: it needs the memory of one block instead of all blocks,
and a third more work. "dots" keeps the outputs of layers and recomputes attention scores and activations, which is
little work.
"""


class Blocks(nnx.List):
    """The blocks of a model. Each reads the output of the previous one."""

    def run(
        self, x: Array, *arguments: Array | None, keys: jax.Array | None, remat: str, every: bool
    ) -> tuple[Array, ...]:
        """Return the states between blocks: `x` and the output of each block, or only the last output.

        Args:
            x: The input of the first block. Every block returns an array of this shape and dtype.
            *arguments: Further arguments of every block.
            keys: A random key for each block, passed as its last argument; `None` passes `None` to every block.
            remat: One of `REMAT`.
            every: Whether to return all states; otherwise the tuple holds only the last.
        """
        states = [x]
        for index, block in enumerate(self):
            key = None if keys is None else keys[index]
            states.append(call_block(block, states[-1], *arguments, key, remat=remat))
        return tuple(states if every else states[-1:])


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
"""Patterns of module paths for adapters, by the names that papers use, in a model that is built of these layers."""


def split_key(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """Return `count` independent keys, or `count` times `None` if there is no key."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def split_block_keys(key: jax.Array | None, depth: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Return a key and an array of `depth` more keys, all independent, or `None` twice if there is no key."""
    if key is None:
        return None, None
    keys = jax.random.split(key, depth + 1)
    return keys[0], keys[1:]


def drop(dropout: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Apply dropout with a random key; `None` drops nothing."""
    return dropout(x, deterministic=key is None, rngs=key)


def call_block(block: nnx.Module, *arguments: Array | None, remat: str) -> Array:
    """Return `block(*arguments)`; its gradient recomputes the parts that `remat`, one of `REMAT`, selects.

    The values do not depend on `remat`. The block must not change its own state when it is called.
    """
    policy = REMAT[remat]
    if policy is None:
        return block(*arguments)
    graphdef, state = nnx.split(block)
    call = jax.checkpoint(lambda state, arguments: nnx.merge(graphdef, state)(*arguments), policy=policy)
    return call(state, arguments)
