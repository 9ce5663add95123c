"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692), with the same results as in Hugging Face transformers.

The model follows
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/bert/modeling_bert.py. The blocks are
post-norm, GELU uses the error function, and position embeddings are learned. LayerNorm has epsilon 1e-12 in BERT, and
1e-5 in RoBERTa.

The suffix of a variable's name gives its dimensions, for example `tokens_bt`: b batch, t tokens, d width of the model,
v vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from surm_jax.errors import UserError
from surm_jax.models.base import (
    HEAD,
    Config,
    Model,
    check_choice,
    check_heads,
    check_sizes,
    check_transformer,
    register_model,
)
from surm_jax.models.layers import (
    ACTIVATIONS,
    MLP,
    TARGETS,
    Attention,
    Blocks,
    drop,
    dropout_key,
    split_block_keys,
    split_key,
    tied_logits,
)

HEADS = ("classifier", "mlm")
POSITIONS = ("absolute", "after_padding")


def _geometry(depth: int, width: int) -> dict[str, int]:
    return {
        "vocab_size": 30522,
        "width": width,
        "depth": depth,
        "heads": width // 64,
        "mlp_width": 4 * width,
        "max_positions": 512,
        "type_vocab_size": 2,
    }


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """Configuration of a `Bert`: its sizes, its head, and its dtypes.

    Raises:
        UserError: A size is not a positive integer, `heads` does not divide `width`, `pad_token` is not in the
            vocabulary or leaves no positions for other tokens, `dropout` is outside [0, 1), `epsilon` is not positive,
            or another value is not allowed.

    >>> config = BertConfig.from_variant("base", num_classes=3, dtype="bfloat16")
    >>> config.width, config.head, config.max_tokens
    (768, 'classifier', 512)
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    # Number of position embeddings.
    max_positions: int
    # Number of segment types. Two types, for example, distinguish the first and the second sentence of a pair.
    type_vocab_size: int
    # Number of outputs of a classifier. A masked language model instead has an output for each token of the vocabulary.
    num_classes: int = 2
    # "classifier": the logits of the classes are computed from the first token of each sequence.
    # "mlm" (masked language model): the logits of the vocabulary are computed at every token.
    head: str = "classifier"
    # Whether a classifier has a dense layer with tanh, called the pooler, between the first token and the head. A
    # masked language model has no such layer.
    pooler: bool = True
    # "absolute": the tokens of a sequence have the positions 0, 1, ...
    # "after_padding" (RoBERTa): the tokens other than pad_token have the positions pad_token + 1, pad_token + 2, ...,
    # and every pad_token has the position pad_token.
    positions: str = "absolute"
    # The token that pads short sequences. It does not exclude padding from attention; only the mask does.
    pad_token: int = 0
    epsilon: float = 1e-12
    activation: str = "gelu"
    # Probability of dropout after the embeddings, on the outputs of attention and MLP, and on the input of a
    # classifier's head.
    dropout: float = 0.0
    # Dtype of the computation. LayerNorms and logits are always computed in float32.
    dtype: str = "float32"
    # Dtype of the parameters. Those of LayerNorms, the pooler and a classifier's head, and the output bias of a masked
    # language model are small and always float32.
    param_dtype: str = "float32"
    # Name of the rematerialisation policy, one of surm_jax.models.REMAT.
    remat: str = "none"

    # The small models of arXiv 1908.08962 (https://github.com/google-research/bert) and the two models of the BERT
    # paper, all with the uncased English vocabulary.
    VARIANTS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "tiny": _geometry(2, 128),
        "mini": _geometry(4, 256),
        "small": _geometry(4, 512),
        "medium": _geometry(8, 512),
        "base": _geometry(12, 768),
        "large": _geometry(24, 1024),
    }
    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "dtype", "param_dtype", "remat")
    HEAD_FIELDS: ClassVar[tuple[str, ...]] = ("num_classes", "head", "pooler")

    def __post_init__(self):
        sizes = ("vocab_size", "width", "depth", "heads", "mlp_width", "max_positions", "type_vocab_size")
        check_sizes(self, (*sizes, "num_classes"))
        for name, known in (("head", HEADS), ("positions", POSITIONS), ("activation", ACTIVATIONS)):
            check_choice(self, name, known)
        check_heads(self)
        check_transformer(self)
        if not (isinstance(self.pad_token, int) and 0 <= self.pad_token < self.vocab_size):
            raise UserError(
                f"BertConfig.pad_token must be a token of the vocabulary, 0 to {self.vocab_size - 1}, "
                f"got {self.pad_token!r}"
            )
        if self.max_tokens < 1:
            raise UserError(
                f"BertConfig.max_positions must be above {self.pad_token + 1}: positions {self.positions!r} begin "
                f"after pad_token {self.pad_token}, got {self.max_positions}"
            )

    @property
    def new_head(self) -> tuple[str, ...]:
        """Regular expressions for the paths of the parameters that a new task initialises anew and trains.

        A masked language model has no such parameters, because its head is pretrained. The classifier of RoBERTa
        consists of two layers, the pooler and the head, and a new task initialises both.
        """
        if self.head == "mlm":
            return ()
        return (*HEAD, r"pooler/.*") if self.positions == "after_padding" and self.pooler else HEAD

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens in a sequence, limited by the position embeddings."""
        return self.max_positions - (self.pad_token + 1 if self.positions == "after_padding" else 0)


class Block(nnx.Module):
    """One post-norm transformer block: `x = norm1(x + attention(x))`, and then `norm2(x + mlp(x))`."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "kernel_init": _init,
            "rngs": rngs,
        }
        self.attention = Attention(config.width, config.heads, **options)
        self.norm1 = _norm(config, rngs)
        # Unlike ViT, BERT has no dropout between the two layers of the MLP.
        self.mlp = MLP(
            config.width,
            config.mlp_width,
            activation=config.activation,
            dropout=0.0,
            bias_init=nnx.initializers.zeros_init(),
            **options,
        )
        self.norm2 = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x_btd: Float[Array, "b t d"], mask_bt: Bool[Array, "b t"] | None, key: jax.Array | None
    ) -> Float[Array, "b t d"]:
        """Return the output of the block.

        Args:
            x_btd: The features of the tokens.
            mask_bt: True for tokens that queries attend to. With None, queries attend to all tokens.
            key: The random key of dropout. None turns dropout off.
        """
        attention_key, mlp_key = split_key(key, 2)
        y_btd = drop(self.dropout, self.attention(x_btd, mask_bt), attention_key)
        # The norms return float32, but the dense layers and their adapters expect the dtype of x.
        x_btd = self.norm1(x_btd + y_btd).astype(x_btd.dtype)
        y_btd = drop(self.dropout, self.mlp(x_btd, None), mlp_key)
        return self.norm2(x_btd + y_btd).astype(x_btd.dtype)


class MaskedLMHead(nnx.Module):
    """Head of a masked language model, which returns a logit for each token of the vocabulary at every position.

    It computes `norm(activation(x T + t)) E^T + b`. T and t are the kernel and bias of `transform`, and b is `bias`.
    E, of shape (v, d), holds the word embeddings, which the model shares between input and output (arXiv 1608.05859).
    Therefore E is an argument of the call and not a parameter of this module.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.transform = nnx.Linear(
            config.width,
            config.width,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            kernel_init=_init,
            rngs=rngs,
        )
        self.norm = _norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))

    def __call__(self, x_btd: Float[Array, "b t d"], embed: nnx.Embed) -> Float[Array, "b t v"]:
        """Return the logits of the vocabulary at every token, in float32.

        Args:
            x_btd: The output of the last block.
            embed: The word embeddings.
        """
        y_btd = self.norm(ACTIVATIONS[self.activation](self.transform(x_btd))).astype(x_btd.dtype)
        return tied_logits(embed, y_btd) + self.bias[...][None, None]


@register_model
class Bert(Model):
    """BERT or RoBERTa, as a classifier of sequences or as a masked language model.

    The parameters have the paths `{word,position,type}_embed/embedding`, `embed_norm/{scale,bias}`,
    `blocks/<i>/attention/{query,key,value,out}/{kernel,bias}`, `blocks/<i>/mlp/{up,down}/{kernel,bias}` and
    `blocks/<i>/{norm1,norm2}/{scale,bias}`. A classifier also has `head/{kernel,bias}`, and, if it has a pooler,
    `pooler/{kernel,bias}`. A masked language model also has `head/transform/{kernel,bias}`, `head/norm/{scale,bias}`
    and `head/bias`. Kernels and embeddings are drawn from N(0, 0.02^2), and biases start at zero.

    Hugging Face transformers applies dropout in two more places than this class: to the attention probabilities, and to
    the input of RoBERTa's pooler. The first is missing here because `jax.nn.dot_product_attention` does not offer it.

    >>> config = BertConfig.from_variant("tiny", num_classes=3)
    >>> jax.eval_shape(lambda tokens: Bert(config, rngs=nnx.Rngs(0))(tokens), jnp.zeros((2, 16), jnp.int32)).shape
    (2, 3)
    """

    config_class: ClassVar[type[Config]] = BertConfig
    reads: ClassVar[str] = "text"
    adapter_targets: ClassVar[Mapping[str, str]] = TARGETS
    after_blocks: ClassVar[tuple[str, ...] | None] = ("pooler",)

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.head: nnx.Module
        self.word_embed = _embed(config.vocab_size, config, rngs)
        self.position_embed = _embed(config.max_positions, config, rngs)
        self.type_embed = _embed(config.type_vocab_size, config, rngs)
        self.embed_norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = Blocks([Block(config, rngs=rngs) for _ in range(config.depth)])
        if config.head == "mlm":
            self.head = MaskedLMHead(config, rngs=rngs)
        else:
            if config.pooler:
                self.pooler = nnx.Linear(config.width, config.width, dtype=jnp.float32, kernel_init=_init, rngs=rngs)
            self.head = nnx.Linear(config.width, config.num_classes, dtype=jnp.float32, kernel_init=_init, rngs=rngs)

    def __call__(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | Int[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> Float[Array, "b num_classes"] | Float[Array, "b t v"]:
        """Return the logits in float32. Their shape is (b, num_classes), or (b, t, v) for a masked language model.

        Args:
            tokens_bt: Indices of tokens in the vocabulary, below `config.vocab_size`. Larger indices give NaN.
            mask: True or 1 for tokens that queries attend to, False or 0 for padding. With None, queries attend to all
                tokens, also to those that equal `config.pad_token`.
            token_types: Segment type of each token, below `config.type_vocab_size`. None means type 0 for all tokens.
            rngs: Random key of dropout, as a JAX key or as an `nnx.Rngs` with the stream `dropout`. None turns dropout
                off.

        Raises:
            UserError: The tokens are not a two-dimensional array of integers, there are more than `config.max_tokens`
                tokens in a row, or `mask` or `token_types` has another shape than the tokens or a wrong dtype.
        """
        key = dropout_key(rngs)
        embed_key, _ = split_block_keys(split_key(key, 2)[0], self.config.depth)
        return self.after(0, self._embed(tokens_bt, mask, token_types, embed_key), mask=mask, rngs=key)

    def before(self, cut: int, inputs: Int[Array, "b t"], **options: Any) -> Array:
        """Return the state at a cut (see `Model.before`). The input of a classifier's head has the shape (b, d)."""
        mask, before_head = options.get("mask"), cut > self.config.depth
        x_btd = self._embed(inputs, mask, options.get("token_types"), None)
        x_btd = self._run(x_btd, mask, None, first=0, last=None if before_head else cut)[-1]
        return self._pool(x_btd) if before_head else x_btd

    def after(self, cut: int, state: Array, *, mask: Array | None = None, rngs: Any = None, **options: Any) -> Array:
        """Return the logits, given the state at a cut (see `Model.after`). Token types have no effect after a cut."""
        del options
        body_key, head_key = split_key(dropout_key(rngs), 2)
        _, keys = split_block_keys(body_key, self.config.depth)
        if cut <= self.config.depth:
            state = self._pool(self._run(state, mask, None if keys is None else keys[cut:], first=cut)[-1])
        if self.config.head == "mlm":
            return self.head(state, self.word_embed)
        return self.head(drop(self.dropout, state, head_key))

    def hidden_states(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | Int[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Return the input of the first block and the outputs of all blocks, `depth + 1` arrays of shape (b, t, d).

        The values at padding tokens have no meaning. Arguments and errors are the same as in `__call__`.
        """
        embed_key, keys = split_block_keys(dropout_key(rngs), self.config.depth)
        return self._run(self._embed(tokens_bt, mask, token_types, embed_key), mask, keys, every=True)

    def _embed(self, tokens_bt: Array, mask: Any, token_types: Any, key: Any) -> Float[Array, "b t d"]:
        """Check the arguments of the model, and return the input of the first block. The key is for dropout."""
        self._check(tokens_bt, mask, token_types)
        types_bt = jnp.zeros_like(tokens_bt) if token_types is None else token_types
        x_btd = self.word_embed(tokens_bt) + self.type_embed(types_bt) + self.position_embed(self._positions(tokens_bt))
        return drop(self.dropout, self.embed_norm(x_btd).astype(x_btd.dtype), key)

    def _run(
        self, x_btd: Array, mask: Array | None, keys: Any, first: int = 0, last: int | None = None, every: bool = False
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Run the blocks from `first` up to `last`. Arguments and results are those of `Blocks.run`."""
        mask_bt = None if mask is None else mask.astype(jnp.bool_)
        return self.blocks.between(first, last).run(x_btd, mask_bt, keys=keys, remat=self.config.remat, every=every)

    def _pool(self, x_btd: Float[Array, "b t d"]) -> Array:
        """Return the input of the head. It has the shape (b, d), or (b, t, d) for a masked language model."""
        if self.config.head == "mlm":
            return x_btd
        return jnp.tanh(self.pooler(x_btd[:, 0])) if self.config.pooler else x_btd[:, 0]

    def _positions(self, tokens_bt: Int[Array, "b t"]) -> Int[Array, "#b t"]:
        if self.config.positions == "absolute":
            return jnp.arange(tokens_bt.shape[1])[None]
        pad_token = self.config.pad_token
        kept_bt = (tokens_bt != pad_token).astype(jnp.int32)
        return jnp.cumsum(kept_bt, axis=1) * kept_bt + pad_token

    def _check(self, tokens_bt: Array, mask: Array | None, token_types: Array | None) -> None:
        if tokens_bt.ndim != 2 or not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
            raise UserError(f"tokens must be integers (batch, tokens), got {tokens_bt.dtype} {tokens_bt.shape}")
        if tokens_bt.shape[1] > self.config.max_tokens:
            raise UserError(
                f"this BERT has positions for {self.config.max_tokens} tokens, got sequences of {tokens_bt.shape[1]}: "
                "truncate them"
            )
        # Refuse a mask of floats, because it is ambiguous. Other libraries add such a mask to the attention scores, so
        # that 0 means that a token is attended to.
        for name, array, kinds in (
            ("mask", mask, (jnp.bool_, jnp.integer)),
            ("token_types", token_types, (jnp.integer,)),
        ):
            if array is not None and (
                array.shape != tokens_bt.shape or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds)
            ):
                expected = " or ".join("booleans" if kind is jnp.bool_ else "integers" for kind in kinds)
                raise UserError(
                    f"{name} must be {expected} of the shape of the tokens, {tokens_bt.shape}, "
                    f"got {array.dtype} {array.shape}"
                )


_init = nnx.initializers.normal(stddev=0.02)


def _embed(rows: int, config: BertConfig, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        rows,
        config.width,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        embedding_init=_init,
        rngs=rngs,
    )


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Compute the variance in two passes, as PyTorch does. The fast formula E[x^2] - E[x]^2 is too inexact for an
    # epsilon as small as 1e-12.
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)
