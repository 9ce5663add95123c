"""The configuration of decoder language models: sizes, the options that distinguish the families, rotary positions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from surm_jax.errors import UserError
from surm_jax.models.base import Config, check_choice, check_sizes, check_transformer
from surm_jax.models.layers import ACTIVATIONS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
ROPE_TYPES = ("default", "linear", "llama3")
GLOBAL, LOCAL = "G", "L"


def _sizes(vocab: int, depth: int, width: int, heads: int, kv_heads: int, mlp_width: int, **other: Any) -> dict:
    sizes = {"vocab_size": vocab, "depth": depth, "width": width, "heads": heads, "kv_heads": kv_heads}
    return {"head_width": width // heads, "mlp_width": mlp_width, "epsilon": 1e-5, **sizes, **other}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """Configuration of a `Decoder`: its sizes, the options that distinguish the families, and its dtypes.

    Raises:
        UserError: A size is not a positive integer, `kv_heads` does not divide `heads`, `head_width` is odd, there is a
            window without local blocks or the reverse, or another value is not allowed.

    >>> config = DecoderConfig.from_variant("llama-2-7b", dtype="bfloat16")
    >>> config.width, config.depth, config.max_tokens
    (4096, 32, 4096)
    """

    # The family, by its name `model_type` in transformers. It decides how a model is written, not what it computes.
    family: str = "llama"
    vocab_size: int
    width: int
    depth: int
    # Number of heads of the queries, and number of heads of the keys and the values.
    heads: int
    kv_heads: int
    # Number of features of one head. It need not be width / heads.
    head_width: int
    mlp_width: int
    # Largest number of tokens in a sequence.
    max_positions: int
    activation: str = "silu"
    epsilon: float = 1e-6
    # Whether the head multiplies by the word embeddings and has no kernel of its own (arXiv 1608.05859).
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    # Whether the queries and the keys of every head are normalised (Qwen3, Gemma 3).
    qk_norm: bool = False
    # Whether the outputs of attention and MLP are normalised too (Gemma).
    post_norms: bool = False
    # Whether a norm multiplies by 1 + scale and not by scale (Gemma).
    unit_offset: bool = False
    # Whether the word embeddings are multiplied by sqrt(width) (Gemma).
    scaled_embed: bool = False
    # Attention scores are divided by the square root of this number. 0: head_width.
    score_width: float = 0.0
    # Attention scores and logits x become c tanh(x / c), with these numbers as c (Gemma 2). 0: they stay x.
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    # The kinds of the blocks, repeated over the depth. G is a global block, in which a token attends to all tokens
    # before it, and L a local one, in which it attends to the last `window` tokens, itself included. Mistral has "L",
    # Gemma 3 "LLLLLG".
    layer_pattern: str = GLOBAL
    window: int = 0
    # The base of the rotary positions, and how their frequencies are scaled for longer contexts. Position p turns the
    # i-th pair of features by the angle p / rope_theta^(2 i / head_width). "linear" divides all frequencies by
    # rope_factor. "llama3" divides those with fewer than rope_low turns in rope_positions tokens by rope_factor, keeps
    # those with more than rope_high turns, and interpolates between both.
    rope_theta: float = 10_000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_positions: int = 8192
    # The base in local blocks, without scaling (Gemma 3). 0: as in global blocks.
    local_rope_theta: float = 0.0
    # The tokens that begin and end a text, and the token that pads one. The model does not use them.
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    # Probability of dropout after the embeddings, and on the outputs of attention and MLP.
    dropout: float = 0.0
    # Dtype of the computation, except for what is computed in float32, and dtype of all parameters.
    dtype: str = "float32"
    param_dtype: str = "float32"
    # Name of the rematerialisation policy, one of surm_jax.models.REMAT.
    remat: str = "none"

    # "decoder-mini" has 5.2 million parameters. The others have the sizes of the published models of these names.
    VARIANTS: ClassVar[dict[str, Mapping[str, Any]]] = {
        "decoder-mini": _sizes(2048, 8, 224, 7, 7, 608, max_positions=512, tied_head=True),
        "llama-2-7b": _sizes(32_000, 32, 4096, 32, 32, 11_008, max_positions=4096),
        "llama-3.2-1b": _sizes(
            128_256, 16, 2048, 32, 8, 8192, max_positions=131_072, tied_head=True,
            rope_theta=500_000.0, rope_type="llama3", rope_factor=32.0,
        ),
    }  # fmt: skip
    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "dtype", "param_dtype", "remat")
    HEAD_FIELDS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width", "max_positions")
        check_sizes(self, (*sizes, "rope_positions"))
        check_transformer(self)
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "rope_type", ROPE_TYPES)
        check_choice(self, "family", FAMILIES)
        for name in ("rope_theta", "rope_factor", "rope_low", "rope_high"):
            self._check_number(name, above_zero=True)
        for name in ("score_width", "attention_softcap", "logit_softcap", "local_rope_theta", "window"):
            self._check_number(name, above_zero=False)
        object.__setattr__(self, "end_tokens", tuple(self.end_tokens))  # A JSON file gives a list.
        for token in (self.begin_token, self.pad_token, *self.end_tokens):
            if token is not None and (not isinstance(token, int) or isinstance(token, bool)):
                raise UserError(f"DecoderConfig: the tokens that begin, end and pad a text are integers, got {token!r}")
        if self.heads % self.kv_heads:
            raise UserError(f"DecoderConfig.kv_heads must divide heads, got {self.kv_heads} for {self.heads} heads")
        if self.head_width % 2:
            raise UserError(f"DecoderConfig.head_width must be even for rotary positions, got {self.head_width}")
        if not self.rope_low < self.rope_high:
            raise UserError(f"DecoderConfig.rope_low must be below rope_high, got {self.rope_low}, {self.rope_high}")
        if not self.layer_pattern or {*self.layer_pattern} - {GLOBAL, LOCAL}:
            raise UserError(f"DecoderConfig.layer_pattern must consist of G and L, got {self.layer_pattern!r}")
        if (LOCAL in self.layer_pattern) != (self.window > 0) or not isinstance(self.window, int):
            raise UserError(
                "DecoderConfig.window must be a positive integer if there are local blocks, and 0 if there are none, "
                f"got {self.window!r} for layer_pattern={self.layer_pattern!r}"
            )

    def _check_number(self, name: str, *, above_zero: bool) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or not 0 <= value < math.inf or (above_zero and not value):
            kind = "positive" if above_zero else "at least 0"
            raise UserError(f"DecoderConfig.{name} must be a number, {kind} and finite, got {value!r}")

    @property
    def new_head(self) -> tuple[str, ...]:
        """Patterns of parameters that a new task initialises: none, because the head continues text in every task."""
        return ()

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens in a sequence."""
        return self.max_positions

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of every block, "global" or "local"."""
        return tuple(self.layer_pattern[index % len(self.layer_pattern)] for index in range(self.depth))


def rope_frequencies(config: DecoderConfig, kind: str) -> Float[np.ndarray, "half"]:
    """Return the angles by which rotary positions turn the pairs of features of a head at position 1.

    They differ between global and local blocks.
    """
    own_base = kind == LOCAL and config.local_rope_theta > 0
    theta = config.local_rope_theta if own_base else config.rope_theta
    plain = theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
    if own_base or config.rope_type == "default":
        return plain.astype(np.float32)
    slow = plain / config.rope_factor
    if config.rope_type == "linear":
        return slow.astype(np.float32)
    turns = plain * config.rope_positions / (2 * np.pi)
    share = np.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    return ((1 - share) * slow + share * plain).astype(np.float32)
