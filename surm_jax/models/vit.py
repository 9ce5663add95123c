"""Vision Transformer (arXiv 2010.11929) with the numerics of google-research/vision_transformer and AugReg checkpoints.

Pre-norm blocks, LayerNorm with epsilon 1e-6, tanh GELU, position embeddings added after the class token:
https://github.com/google-research/vision_transformer/blob/main/vit_jax/models_vit.py.
Suffixes of local names: b batch, h height, w width, c channels, t tokens, d width, n heads, k width of a head.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError, did_you_mean

POOLS = ("token", "mean")
DTYPES = ("float32", "bfloat16")

VARIANTS: Mapping[str, Mapping[str, int | str]] = {
    # Table 2 of https://arxiv.org/abs/2106.04560
    "Ti/16": {"image_size": 224, "patch_size": 16, "width": 192, "depth": 12, "heads": 3, "mlp_width": 768},
    "S/16": {"image_size": 224, "patch_size": 16, "width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B/16": {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    # Small enough for a CPU: CIFAR-sized images, and the 8 x 8 digits of scikit-learn.
    "mini": {"image_size": 32, "patch_size": 4, "width": 192, "depth": 6, "heads": 3, "mlp_width": 768},
    "digits": {
        "image_size": 8,
        "channels": 1,
        "patch_size": 2,
        "width": 64,
        "depth": 4,
        "heads": 4,
        "mlp_width": 256,
        "pool": "mean",
    },
}
"""Geometry of the named models: the fields of `ViTConfig` that each of them sets."""

TARGETS: Mapping[str, str] = {
    "qkv": r"blocks/\d+/attention/(query|key|value)",
    "qv": r"blocks/\d+/attention/(query|value)",
    "attention": r"blocks/\d+/attention/(query|key|value|out)",
    "mlp": r"blocks/\d+/mlp/(up|down)",
    "houlsby": r"blocks/\d+/(attention|mlp)",
    "pfeiffer": r"blocks/\d+/mlp",
    "all-linear": r"blocks/\d+/(attention/(query|key|value|out)|mlp/(up|down))",
}
"""Named sets of modules for adapters: patterns for `re.fullmatch` over module paths."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Geometry and precision of a `ViT`.

    Raises:
        UserError: a size is not a positive integer, heads do not divide the width, patches do not divide the image,
            dropout is outside [0, 1), or `pool` or `dtype` is unknown.

    >>> config = ViTConfig.from_variant("B/16", num_classes=10, dtype="bfloat16")
    >>> config.width, config.grid, config.tokens
    (768, 14, 197)
    """

    # Height and width of the images, in pixels.
    image_size: int
    # Height and width of a patch, in pixels.
    patch_size: int
    channels: int = 3
    width: int
    depth: int
    heads: int
    mlp_width: int
    num_classes: int
    # What the head reads: the class token, or the mean over all patches (then there is no class token).
    pool: str = "token"
    # Probability of zeroing an activation, after the position embeddings and at the end of and inside the branches.
    dropout: float = 0.0
    # Of the computation; parameters, norms and logits are float32 always.
    dtype: str = "float32"

    # Fields that change how the model runs but none of its parameters, and those that change the head alone:
    # a checkpoint may differ from the model in the former, and in the latter where the head is not loaded.
    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "dtype")
    HEAD_FIELDS: ClassVar[tuple[str, ...]] = ("num_classes",)

    def __post_init__(self):
        for name in ("image_size", "patch_size", "channels", "width", "depth", "heads", "mlp_width", "num_classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"ViTConfig.{name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise UserError(f"ViTConfig.heads must divide the width, got {self.heads} heads for width {self.width}")
        if self.image_size % self.patch_size:
            raise UserError(
                "ViTConfig.patch_size must divide the image size, "
                f"got patches of {self.patch_size} pixels for images of {self.image_size}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"ViTConfig.dropout must be in [0, 1), got {self.dropout}")
        for name, known in (("pool", POOLS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"ViTConfig.{name} must be one of {known}, got {value!r}{did_you_mean(str(value), known)}"
                )

    @classmethod
    def from_variant(cls, name: str, *, num_classes: int, **overrides: Any) -> "ViTConfig":
        """Returns the configuration of a named model (`VARIANTS`), with some fields replaced.

        Raises:
            UserError: no such variant or field, or the fields do not fit together.
        """
        if name not in VARIANTS:
            raise UserError(f"there is no ViT {name!r}; there are {sorted(VARIANTS)}{did_you_mean(name, VARIANTS)}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            if key not in fields:
                raise UserError(f"ViTConfig has no field {key!r}; it has {fields}{did_you_mean(key, fields)}")
        return cls(**{**VARIANTS[name], "num_classes": num_classes, **overrides})

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches, and the class token where there is one."""
        return self.grid**2 + (self.pool == "token")


class Attention(nnx.Module):
    """Multi-head self-attention, `softmax(Q K^T / sqrt(k)) V` for every head (arXiv 1706.03762, equation 1).

    The four projections are called as modules, so that wrapping one of them changes the model.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        heads_shape = (config.heads, config.width // config.heads)
        options = {"dtype": jnp.dtype(config.dtype), "kernel_init": nnx.initializers.xavier_uniform(), "rngs": rngs}
        self.query = nnx.LinearGeneral(config.width, heads_shape, **options)
        self.key = nnx.LinearGeneral(config.width, heads_shape, **options)
        self.value = nnx.LinearGeneral(config.width, heads_shape, **options)
        self.out = nnx.LinearGeneral(heads_shape, config.width, axis=(-2, -1), **options)

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Mixes the tokens; the softmax is float32 whatever the compute dtype. Cost `O(t d^2 + t^2 d)` per image."""
        q_btnk, k_btnk, v_btnk = self.query(x_btd), self.key(x_btd), self.value(x_btd)
        # jax.nn asks for the promotion of bfloat16 to float32, which strict promotion refuses even to answer.
        with jax.numpy_dtype_promotion("standard"):
            y_btnk = jax.nn.dot_product_attention(q_btnk, k_btnk, v_btnk)
        return self.out(y_btnk)


class MLP(nnx.Module):
    """`gelu(x U + u) D + d` on every token alone, with the tanh form of GELU; `(b, t, d) -> (b, t, d)`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        options = {
            "dtype": jnp.dtype(config.dtype),
            "kernel_init": nnx.initializers.xavier_uniform(),
            "bias_init": nnx.initializers.normal(stddev=1e-6),
            "rngs": rngs,
        }
        self.up = nnx.Linear(config.width, config.mlp_width, **options)
        self.down = nnx.Linear(config.mlp_width, config.width, **options)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_btd: Float[Array, "b t d"], key: jax.Array | None) -> Float[Array, "b t d"]:
        """Applies the two layers; `key` draws the dropout between them, `None` means no dropout."""
        hidden_btm = jax.nn.gelu(self.up(x_btd), approximate=True)
        return self.down(_drop(self.dropout, hidden_btm, key))


class Block(nnx.Module):
    """One pre-norm encoder block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_btd: Float[Array, "b t d"], key: jax.Array | None) -> Float[Array, "b t d"]:
        """Applies both branches; `key` draws their dropout, `None` means no dropout."""
        attention_key, hidden_key, mlp_key = _split(key, 3)
        # The norms are float32; what the branches (and adapters on their layers) read has the dtype of the residual
        # stream.
        y_btd = self.attention(self.norm1(x_btd).astype(x_btd.dtype))
        x_btd = x_btd + _drop(self.dropout, y_btd, attention_key)
        y_btd = self.mlp(self.norm2(x_btd).astype(x_btd.dtype), hidden_key)
        return x_btd + _drop(self.dropout, y_btd, mlp_key)


class ViT(nnx.Module):
    """Vision Transformer classifier.

    Parameter paths: `patch_embed/{kernel,bias}`, `cls_token` (with `pool="token"`), `position_embed`,
    `blocks/<i>/{norm1,norm2}/{scale,bias}`, `blocks/<i>/attention/{query,key,value,out}/{kernel,bias}`,
    `blocks/<i>/mlp/{up,down}/{kernel,bias}`, `norm/{scale,bias}`, `head/{kernel,bias}`. All are float32, initialised as
    in
    vision_transformer: the head starts at zero, hence so do the logits.

    >>> config = ViTConfig.from_variant("digits", num_classes=10)
    >>> jax.eval_shape(lambda images: ViT(config, rngs=nnx.Rngs(0))(images), jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch = (config.patch_size, config.patch_size)
        self.patch_embed = nnx.Conv(
            config.channels,
            config.width,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        if config.pool == "token":
            self.cls_token = nnx.Param(jnp.zeros((1, 1, config.width), jnp.float32))
        init_position = nnx.initializers.normal(stddev=0.02)
        self.position_embed = nnx.Param(init_position(rngs.params(), (1, config.tokens, config.width), jnp.float32))
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        # The head too is float32: rounding the logits to bfloat16 would show in the loss.
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(
            config.width,
            config.num_classes,
            dtype=jnp.float32,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    def __call__(
        self,
        images_bhwc: Float[Array, "b h w c"],
        *,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> Float[Array, "b num_classes"]:
        """Returns float32 logits.

        Args:
            images_bhwc: images of `config.image_size` and `config.channels`; AugReg checkpoints expect values in [-1,
                1].
            rngs: draws the dropout, from the stream `dropout` of an `nnx.Rngs` or from a JAX key; `None` means no
                dropout.

        Raises:
            UserError: the images are not of the configured shape.
        """
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images_bhwc.ndim != 4 or images_bhwc.shape[1:] != expected:
            raise UserError(
                f"this ViT reads images of shape (batch, {', '.join(map(str, expected))}), got {images_bhwc.shape}"
            )
        embed_key, *block_keys = _split(rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs, config.depth + 1)

        patches_bhwd = self.patch_embed(images_bhwc)
        batch, width = patches_bhwd.shape[0], config.width
        x_btd = patches_bhwd.reshape(batch, config.grid**2, width)
        if config.pool == "token":
            cls_btd = jnp.broadcast_to(self.cls_token[...].astype(x_btd.dtype), (batch, 1, width))
            x_btd = jnp.concatenate([cls_btd, x_btd], axis=1)
        x_btd = _drop(self.dropout, x_btd + self.position_embed[...].astype(x_btd.dtype), embed_key)
        for block, key in zip(self.blocks, block_keys, strict=True):
            x_btd = block(x_btd, key)
        x_btd = self.norm(x_btd)
        pooled_bd = x_btd[:, 0] if config.pool == "token" else x_btd.mean(axis=1)
        return self.head(pooled_bd)


def _split(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """Returns `count` independent keys, or as many `None`."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def _drop(dropout: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Dropout drawn from `key`; nothing is dropped without one."""
    return dropout(x, deterministic=key is None, rngs=key)
