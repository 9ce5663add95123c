"""Decoder language models: Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3 (text), as in Hugging Face transformers.

The models follow
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/llama/modeling_llama.py and the files of
the other families beside it. The blocks are pre-norm with RMSNorm (arXiv 1910.07467), rotary positions (arXiv
2104.09864), grouped-query attention (arXiv 2305.13245) and a gated MLP (arXiv 2002.05202). The options of
`DecoderConfig` make the differences between the families. Norms, rotations, softmax and logits are computed in float32.

The suffix of a variable's name gives its dimensions, for example `x_btd`: b batch, t tokens, s tokens that are attended
to, d width of the model, h width of the MLP's hidden layer, n heads of queries, m heads of keys and values, k width of
one head, v vocabulary, l blocks, p kinds of blocks (global and local).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from surm_jax.errors import UserError
from surm_jax.models.base import Config, Model, register_model
from surm_jax.models.decoder_config import LOCAL, DecoderConfig, rope_frequencies
from surm_jax.models.layers import (
    ACTIVATIONS,
    TARGETS,
    Blocks,
    RMSNorm,
    drop,
    rotate,
    softcap,
    split_block_keys,
    split_key,
    tied_logits,
)


class Cache(NamedTuple):
    """The keys and values of tokens that a decoder has read, so that it need not read them again.

    All shapes are static, so that one compiled program serves every step. A program that donates the cache
    (`jax.jit(..., donate_argnames="cache")`) changes it in place. `Decoder.decode` writes new tokens into the slots
    after the first `length` slots. The fields are `keys` and `values` of shape (blocks, batch, slots, kv_heads,
    head_width), `segments` and `positions` of shape (batch, slots), and the number `length`.
    """

    keys: Float[Array, "l b s m k"]
    values: Float[Array, "l b s m k"]
    segments: Int[Array, "b s"]
    positions: Int[Array, "b s"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int) -> "Cache":
        """Return a cache for `slots` tokens in each row of a batch.

        Raises:
            UserError: The model reads fewer tokens than `slots`.
        """
        if slots > config.max_tokens:
            raise UserError(f"this decoder reads at most {config.max_tokens} tokens, got a cache for {slots}")
        shape = (config.depth, batch, slots, config.kv_heads, config.head_width)
        keys, places = jnp.zeros(shape, config.dtype), jnp.zeros((batch, slots), jnp.int32)
        return cls(keys, keys, places, places, jnp.zeros((), jnp.int32))


class State(NamedTuple):
    """What one block passes to the next: features, the number of the next block, and a cache of keys and values.

    The blocks are counted here, so that they have equal structures and can run in one `jax.lax.scan`.
    """

    x: Float[Array, "b t d"]
    number: Int[Array, ""]
    keys: Float[Array, "l b s m k"] | None
    values: Float[Array, "l b s m k"] | None


class Context(NamedTuple):
    """What is the same for all blocks in one call of the model, computed once before the first block.

    It holds the kind of each block, the masks and rotations of each kind, and the first free slot of the cache.
    """

    masks: Bool[Array, "p #b t s"]
    turns: Float[Array, "p 2 #b t half"]
    kinds: Int[np.ndarray, "l"]
    start: Int[Array, ""] | None

    @classmethod
    def of(cls, config: DecoderConfig, segments_bt: Array, cache: Cache | None) -> "tuple[Context, Cache | None]":
        """Return the context for new tokens, and the cache to which their segments and positions are added.

        A token attends to itself and to the earlier tokens of its segment. Their number is its position.
        """
        start, others_bs = None, segments_bt
        if cache is not None:
            start, others_bs = cache.length, _written(cache.segments, segments_bt, (0, cache.length))
        order = jnp.arange(segments_bt.shape[1])[:, None] + (0 if start is None else start)
        causal_ts = jnp.arange(others_bs.shape[1])[None] <= order
        mask_bts = (segments_bt[:, :, None] == others_bs[:, None]) & causal_ts[None]
        positions_bt = mask_bts.sum(-1, dtype=jnp.int32) - 1
        positions_bs = positions_bt
        if cache is not None:
            positions_bs = _written(cache.positions, positions_bt, (0, cache.length))
            cache = cache._replace(
                segments=others_bs, positions=positions_bs, length=cache.length + segments_bt.shape[1]
            )
        near_bts = positions_bt[:, :, None] - positions_bs[:, None] < config.window
        letters = sorted(set(config.kinds))
        masks = jnp.stack([mask_bts & near_bts if letter == LOCAL else mask_bts for letter in letters])
        frequencies = np.stack([rope_frequencies(config, letter) for letter in letters])
        angles = positions_bt.astype(jnp.float32)[None, :, :, None] * frequencies[:, None, None]
        turns = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        return cls(masks, turns, np.array([letters.index(letter) for letter in config.kinds]), start), cache


def _written(array: Array, new: Array, at: tuple) -> Array:
    return jax.lax.dynamic_update_slice(array, new.astype(array.dtype), at)


class GroupedAttention(nnx.Module):
    """Causal attention in which several heads of queries share one head of keys and values."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        queries, keys = (config.heads, config.head_width), (config.kv_heads, config.head_width)
        bias, options = config.qkv_bias, _options(config, rngs)
        self.config = config
        self.query = nnx.LinearGeneral(config.width, queries, use_bias=bias, **options)
        self.key = nnx.LinearGeneral(config.width, keys, use_bias=bias, **options)
        self.value = nnx.LinearGeneral(config.width, keys, use_bias=bias, **options)
        self.out = nnx.LinearGeneral(queries, config.width, axis=(-2, -1), use_bias=config.out_bias, **options)
        self.query_norm = _norm(config.head_width, config) if config.qk_norm else None
        self.key_norm = _norm(config.head_width, config) if config.qk_norm else None

    def keys_and_values(self, x_btd: Float[Array, "b t d"], turns: Array | None) -> tuple[Array, Array]:
        """Return the keys, turned by their positions, and the values of tokens, both of shape (b, t, m, k)."""
        k_btmk = self.key(x_btd)
        return rotate(k_btmk if self.key_norm is None else self.key_norm(k_btmk), turns), self.value(x_btd)

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        mask_bts: Bool[Array, "#b t s"] | None,
        turns: Float[Array, "2 #b t half"] | None,
        others: tuple[Array, Array] | None,
    ) -> Float[Array, "b t d"]:
        """Return the output of attention for every token.

        Args:
            x_btd: The features of the tokens.
            mask_bts: True where token t attends to token s. None: every token attends to every token.
            turns: The cosines and sines of the rotary positions of the tokens. None: no positions.
            others: The keys and values of the tokens to attend to. None: those of `x_btd`.
        """
        config, q_btnk = self.config, self.query(x_btd)
        q_btnk = rotate(q_btnk if self.query_norm is None else self.query_norm(q_btnk), turns)
        k_bsmk, v_bsmk = self.keys_and_values(x_btd, turns) if others is None else others
        q_btmgk = q_btnk.reshape(*q_btnk.shape[:2], config.kv_heads, -1, config.head_width)
        scores = jnp.einsum("btmgk,bsmk->bmgts", q_btmgk, k_bsmk, preferred_element_type=jnp.float32)
        scores = softcap(scores * (config.score_width or config.head_width) ** -0.5, config.attention_softcap)
        if mask_bts is not None:
            scores = jnp.where(mask_bts[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v_bsmk.dtype)
        return self.out(jnp.einsum("bmgts,bsmk->btmgk", weights, v_bsmk).reshape(q_btnk.shape))


class GatedMLP(nnx.Module):
    """The gated MLP `(activation(x G) * (x U)) D`, with the kernels of `gate`, `up` and `down` as G, U and D."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        options = {"use_bias": config.mlp_bias, **_options(config, rngs)}
        self.activation = config.activation
        self.gate = nnx.Linear(config.width, config.mlp_width, **options)
        self.up = nnx.Linear(config.width, config.mlp_width, **options)
        self.down = nnx.Linear(config.mlp_width, config.width, **options)

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the output of the three layers."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x_btd)) * self.up(x_btd))


class Block(nnx.Module):
    """One block: `x + attention(norm1(x))`, then, with this as x, `x + mlp(norm2(x))`.

    With `config.post_norms`, the outputs of attention and MLP also pass through `post_norm1` and `post_norm2`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = _norm(config.width, config), _norm(config.width, config)
        self.post_norm1 = _norm(config.width, config) if config.post_norms else None
        self.post_norm2 = _norm(config.width, config) if config.post_norms else None
        self.attention = GroupedAttention(config, rngs=rngs)
        self.mlp = GatedMLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, state: State, context: Context, key: jax.Array | None) -> State:
        """Return the state for the next block. `key` is the random key of dropout, and None turns dropout off."""
        x_btd, number, keys, values = state
        kind = _item(jnp.asarray(context.kinds), number)
        mask_bts, turns = (_item(array, kind) for array in (context.masks, context.turns))
        attention_key, mlp_key = split_key(key, 2)
        y_btd, others = self.norm1(x_btd), None
        if keys is not None and values is not None:
            new_keys, new_values = self.attention.keys_and_values(y_btd, turns)
            keys = _written(keys, new_keys[None], (number, 0, context.start, 0, 0))
            values = _written(values, new_values[None], (number, 0, context.start, 0, 0))
            others = _item(keys, number), _item(values, number)
        y_btd = self.attention(y_btd, mask_bts, turns, others)
        x_btd = x_btd + drop(self.dropout, _normed(y_btd, self.post_norm1), attention_key)
        y_btd = _normed(self.mlp(self.norm2(x_btd)), self.post_norm2)
        return State(x_btd + drop(self.dropout, y_btd, mlp_key), number + 1, keys, values)


@register_model
class Decoder(Model):
    """A language model that continues text: from the tokens of a text, it predicts the next token at every place.

    The parameters have the paths `embed/embedding`, `blocks/<i>/attention/{query,key,value,out}/{kernel,bias}`,
    `blocks/<i>/attention/{query_norm,key_norm}/scale`, `blocks/<i>/mlp/{gate,up,down}/{kernel,bias}`,
    `blocks/<i>/{norm1,post_norm1,norm2,post_norm2}/scale`, `norm/scale` and `head/kernel`. Some of them exist only with
    certain settings of the configuration. Kernels and embeddings are drawn from N(0, 0.02^2).

    `model(tokens)` returns the logits of all tokens. For a large vocabulary they take more memory than the model, so
    `features` returns what the head reads, and `logits` applies the head to any part of it. `decode` reads new tokens
    after those in a `Cache`.

    >>> config = DecoderConfig.from_variant("decoder-mini")
    >>> jax.eval_shape(lambda tokens: Decoder(config, rngs=nnx.Rngs(0))(tokens), jnp.zeros((2, 16), jnp.int32)).shape
    (2, 16, 2048)
    """

    config_class: ClassVar[type[Config]] = DecoderConfig
    reads: ClassVar[str] = "prompts"
    adapter_targets: ClassVar[Mapping[str, str]] = {
        **TARGETS,
        "mlp": r"blocks/\d+/mlp/(gate|up|down)",
        "all-linear": r"blocks/\d+/(attention/(query|key|value|out)|mlp/(gate|up|down))",
    }

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embed = nnx.Embed(
            config.vocab_size, config.width, dtype=dtype, param_dtype=param_dtype, embedding_init=_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = Blocks([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = _norm(config.width, config)
        # The sums of logits are in float32, because rounding them to bfloat16 would change the loss visibly.
        head = {"use_bias": False, "preferred_element_type": jnp.float32, **_options(config, rngs)}
        self.head = None if config.tied_head else nnx.Linear(config.width, config.vocab_size, **head)

    def __call__(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        segments: Int[Array, "b t"] | Bool[Array, "b t"] | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> Float[Array, "b t v"]:
        """Return the logits of the token that follows each token, in float32.

        Args:
            tokens_bt: Indices of tokens in the vocabulary, below `config.vocab_size`. Larger indices give NaN.
            segments: The text to which each token belongs, as a positive number, and 0 for padding, at either side. So
                a mask of padding is an example. Tokens attend only to tokens of their own text, and positions count
                within it, so several texts can be packed into one row. None: every row is one text.
            rngs: Random key of dropout, as a JAX key or as an `nnx.Rngs` with the stream `dropout`. None turns dropout
                off.

        Raises:
            UserError: The tokens are not a two-dimensional array of integers, there are more than `config.max_tokens`
                tokens in a row, or `segments` has another shape or a wrong dtype.
        """
        return self.logits(self.features(tokens_bt, segments=segments, rngs=rngs))

    def logits(self, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Return the logits in float32 for any part of the array that `features` or `decode` returns."""
        logits = tied_logits(self.embed, x) if self.head is None else self.head(x)
        return softcap(logits, self.config.logit_softcap)

    def features(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        segments: Int[Array, "b t"] | Bool[Array, "b t"] | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> Float[Array, "b t d"]:
        """Return the input of the head: the output of the last block after the norm. The arguments are as in a call."""
        return self.norm(self._states(tokens_bt, segments, None, rngs, every=False)[0][-1].x)

    def hidden_states(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        segments: Int[Array, "b t"] | Bool[Array, "b t"] | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Return the inputs of all blocks and the input of the head, `depth + 1` arrays of shape (b, t, d).

        These are the `hidden_states` of Hugging Face transformers. Values at padding have no meaning. The arguments are
        those of a call.
        """
        states, _ = self._states(tokens_bt, segments, None, rngs, every=True)
        return (*(state.x for state in states[:-1]), self.norm(states[-1].x))

    def decode(
        self,
        tokens_bt: Int[Array, "b t"],
        cache: Cache,
        *,
        segments: Int[Array, "b t"] | Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Read new tokens after those in the cache, and return the input of the head for them and the longer cache.

        The results equal those of `features` for all tokens at once. If the cache has too few free slots, the result is
        NaN, because the number of used slots is known only when the program runs.

        Args:
            tokens_bt: The new tokens, a whole prompt or a single token in each row.
            cache: `Cache.empty`, or the cache that an earlier call returned.
            segments: As in a call. Padding may also lie between a short prompt and its continuation. None: the tokens
                belong to text 1, which is also that of a mask of padding.
        """
        states, longer = self._states(tokens_bt, segments, cache, None, every=False)
        state = states[-1]
        fits = longer.length <= longer.segments.shape[1]
        return jnp.where(fits, self.norm(state.x), jnp.nan), longer._replace(keys=state.keys, values=state.values)

    def _states(
        self,
        tokens_bt: Array,
        segments: Array | None,
        cache: Cache | None,
        rngs: nnx.Rngs | jax.Array | None,
        *,
        every: bool,
    ) -> tuple[tuple[State, ...], Any]:
        """Return all hidden states, or only the last one, and the longer cache."""
        self._check(tokens_bt, segments)
        config = self.config
        if segments is None:
            # The rows are alike, so one row of masks and positions serves all. A cache keeps every row.
            segments = jnp.ones((1 if cache is None else tokens_bt.shape[0], tokens_bt.shape[1]), jnp.int32)
        context, longer = Context.of(config, segments.astype(jnp.int32), cache)
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        embed_key, keys = split_block_keys(key, config.depth)
        x_btd = self.embed(tokens_bt)
        if config.scaled_embed:
            x_btd = x_btd * jnp.asarray(config.width**0.5, x_btd.dtype)
        first = State(drop(self.dropout, x_btd, embed_key), jnp.zeros((), jnp.int32), None, None)
        if cache is not None:
            first = first._replace(keys=cache.keys, values=cache.values)
        remat = config.remat if cache is None else "none"
        return self.blocks.run(first, context, keys=keys, remat=remat, every=every), longer

    def _check(self, tokens_bt: Array, segments: Array | None) -> None:
        if tokens_bt.ndim != 2 or not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
            raise UserError(f"tokens must be integers (batch, tokens), got {tokens_bt.dtype} {tokens_bt.shape}")
        if tokens_bt.shape[1] > self.config.max_tokens:
            raise UserError(
                f"this decoder reads at most {self.config.max_tokens} tokens, got sequences of {tokens_bt.shape[1]}: "
                "truncate them"
            )
        # Refuse a mask of floats, because it is ambiguous. Other libraries add such a mask to the attention scores.
        if segments is not None and (
            segments.shape != tokens_bt.shape
            or not any(jnp.issubdtype(segments.dtype, kind) for kind in (jnp.bool_, jnp.integer))
        ):
            raise UserError(
                f"segments must be integers or booleans of the shape of the tokens, {tokens_bt.shape}, "
                f"got {segments.dtype} {segments.shape}"
            )


_init = nnx.initializers.normal(stddev=0.02)


def _options(config: DecoderConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    return {"dtype": dtype, "param_dtype": param_dtype, "kernel_init": _init, "rngs": rngs}


def _norm(width: int, config: DecoderConfig) -> RMSNorm:
    return RMSNorm(width, epsilon=config.epsilon, offset=float(config.unit_offset), param_dtype=config.param_dtype)


def _normed(y_btd: Array, norm: RMSNorm | None) -> Array:
    return y_btd if norm is None else norm(y_btd)


def _item(array: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
