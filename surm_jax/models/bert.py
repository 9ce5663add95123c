"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) with the numerics of transformers' PyTorch models.

The blocks are post-norm, LayerNorm has epsilon 1e-12 (RoBERTa: 1e-5), GELU uses the error function, and position
embeddings are learned:
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/bert/modeling_bert.py.
Suffixes of local names: b batch, t tokens, d width, v vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from surm_jax.errors import UserError
from surm_jax.models.base import HEAD, Config, Model, check_choice, check_sizes, check_transformer, register_model
from surm_jax.models.layers import ACTIVATIONS, MLP, TARGETS, Attention, Blocks, drop, split_block_keys, split_key

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
    """Geometry and precision of a `Bert`.

    Raises:
        UserError: A size is not a positive integer, heads do not divide the width, the padding token is not in the
            vocabulary or leaves no positions, dropout is outside [0, 1), epsilon is not positive, or `head`,
            `positions`, `activation` or a dtype is unknown.

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
    # Number of segment types, such as first and second sentence.
    type_vocab_size: int
    # Outputs of the classifier. A masked language model has one output for each token of the vocabulary instead.
    num_classes: int = 2
    # "classifier" scores the classes from the first token. "mlm", a masked language model, scores the vocabulary at
    # every token.
    head: str = "classifier"
    # Whether the classifier reads the first token through a dense layer and tanh; "mlm" has no such layer.
    pooler: bool = True
    # "absolute" numbers all tokens 0, 1, ... "after_padding" (RoBERTa) numbers the tokens that are not padding
    # pad_token + 1, pad_token + 2, ... and gives padding the position pad_token.
    positions: str = "absolute"
    # The token that pads short sequences. Only the mask, and not this token, excludes padding from attention.
    pad_token: int = 0
    epsilon: float = 1e-12
    activation: str = "gelu"
    # Probability of dropping an activation: after the embeddings, at the end of branches, before the classifier.
    dropout: float = 0.0
    # Dtype of the computation; norms and logits are always float32.
    dtype: str = "float32"
    # Dtype of embeddings and layers. Norms, pooler, classifier and the output bias of the vocabulary are small and
    # always float32.
    param_dtype: str = "float32"
    # What a block recomputes for its gradient: one of surm_jax.models.REMAT.
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
        """Patterns of the parameters that a new task initialises and trains.

        There are none for a masked language model, whose head is pretrained. RoBERTa's classifier has two layers, and
        a new task initialises both: the pooler and the head.
        """
        if self.head == "mlm":
            return ()
        return (*HEAD, r"pooler/.*") if self.positions == "after_padding" and self.pooler else HEAD

    @property
    def max_tokens(self) -> int:
        """Length of the longest sequence for which there are position embeddings."""
        return self.max_positions - (self.pad_token + 1 if self.positions == "after_padding" else 0)


class Block(nnx.Module):
    """One post-norm encoder block: `norm1(x + attention(x))`, then `norm2(x + mlp(x))`."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
            "kernel_init": _init,
            "rngs": rngs,
        }
        self.attention = Attention(config.width, config.heads, **options)
        self.norm1 = _norm(config, rngs)
        # Unlike ViT, BERT has no dropout between the two layers.
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
        """Apply both branches; `key` is the random key of their dropout, and `None` turns dropout off."""
        attention_key, mlp_key = split_key(key, 2)
        y_btd = drop(self.dropout, self.attention(x_btd, mask_bt), attention_key)
        # The norms return float32, but layers and their adapters expect the dtype of the computation.
        x_btd = self.norm1(x_btd + y_btd).astype(x_btd.dtype)
        y_btd = drop(self.dropout, self.mlp(x_btd, None), mlp_key)
        return self.norm2(x_btd + y_btd).astype(x_btd.dtype)


class MaskedLMHead(nnx.Module):
    """Scores of the vocabulary at every token: `norm(activation(x T + t)) E^T + b` with the word embeddings `E`.

    `E` is an argument, since the model shares it between input and output (arXiv 1608.05859).
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

    def __call__(self, x_btd: Float[Array, "b t d"], table_vd: Float[Array, "v d"]) -> Float[Array, "b t v"]:
        """Return float32 scores; the product with the table has inputs in the dtype of `x_btd` and float32 sums."""
        y_btd = self.norm(ACTIVATIONS[self.activation](self.transform(x_btd))).astype(x_btd.dtype)
        scores_btv = jnp.einsum("btd,vd->btv", y_btd, table_vd.astype(x_btd.dtype), preferred_element_type=jnp.float32)
        return scores_btv + self.bias[...][None, None]


@register_model
class Bert(Model):
    """BERT or RoBERTa, as a classifier of sequences or as a masked language model.

    Parameter paths: `{word,position,type}_embed/embedding`, `embed_norm/{scale,bias}`,
    `blocks/<i>/attention/{query,key,value,out}/{kernel,bias}`, `blocks/<i>/mlp/{up,down}/{kernel,bias}`,
    `blocks/<i>/{norm1,norm2}/{scale,bias}`. A classifier has `pooler/{kernel,bias}` and `head/{kernel,bias}`, a masked
    language model `head/transform/{kernel,bias}`, `head/norm/{scale,bias}` and `head/bias`. Kernels and embeddings
    start from N(0, 0.02^2), biases at zero.

    Dropout differs from transformers in two places. Attention probabilities have none, because
    `jax.nn.dot_product_attention` does not offer it. The input of RoBERTa's pooler has none either.

    >>> config = BertConfig.from_variant("tiny", num_classes=3)
    >>> jax.eval_shape(lambda tokens: Bert(config, rngs=nnx.Rngs(0))(tokens), jnp.zeros((2, 16), jnp.int32)).shape
    (2, 3)
    """

    config_class: ClassVar[type[Config]] = BertConfig
    reads: ClassVar[str] = "text"
    adapter_targets: ClassVar[Mapping[str, str]] = TARGETS

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
        """Return float32 logits: of the classes, or of the vocabulary at every token.

        Args:
            tokens_bt: Token numbers below `config.vocab_size` (larger ones give NaN).
            mask: True or 1 for tokens to attend to, False or 0 for padding. `None` attends to all tokens, also to those
                equal to `config.pad_token`.
            token_types: Segment types below `config.type_vocab_size`; `None` means 0 everywhere.
            rngs: Random key of dropout: an `nnx.Rngs` with the stream `dropout`, or a JAX key; `None` turns dropout
                off.

        Raises:
            UserError: The tokens are not a matrix of integers, a row has more than `config.max_tokens`, or `mask` or
                `token_types` has another shape or dtype.
        """
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        body_key, head_key = split_key(key, 2)
        x_btd = self._states(tokens_bt, mask, token_types, body_key, every=False)[-1]
        if self.config.head == "mlm":
            return self.head(x_btd, self.word_embed.embedding[...])
        x_bd = x_btd[:, 0]
        if self.config.pooler:
            x_bd = jnp.tanh(self.pooler(x_bd))
        return self.head(drop(self.dropout, x_bd, head_key))

    def hidden_states(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | Int[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Return the embeddings and the output of each block: `depth + 1` arrays.

        Arguments and errors are those of `__call__`. The states of padding have no meaning.
        """
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
        return self._states(tokens_bt, mask, token_types, key, every=True)

    def _states(
        self,
        tokens_bt: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | Int[Array, "b t"] | None,
        token_types: Int[Array, "b t"] | None,
        key: jax.Array | None,
        *,
        every: bool,
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Return all states if `every` is true, and otherwise a tuple of only the last."""
        self._check(tokens_bt, mask, token_types)
        mask_bt = None if mask is None else mask.astype(jnp.bool_)
        types_bt = jnp.zeros_like(tokens_bt) if token_types is None else token_types
        embed_key, keys = split_block_keys(key, self.config.depth)
        x_btd = self.word_embed(tokens_bt) + self.type_embed(types_bt) + self.position_embed(self._positions(tokens_bt))
        x_btd = drop(self.dropout, self.embed_norm(x_btd).astype(x_btd.dtype), embed_key)
        return self.blocks.run(x_btd, mask_bt, keys=keys, remat=self.config.remat, every=every)

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
        # A mask of floats is refused because it is ambiguous: other libraries add it to the scores, where 0 keeps a
        # token.
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
    # Compute the variance in two passes, as PyTorch does: for so small an epsilon E[x^2] - E[x]^2 is too inexact.
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)
