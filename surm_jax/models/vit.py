"""Vision Transformer (arXiv 2010.11929), with the variations of AugReg, DeiT, DINOv2, CLIP and I-JEPA.

The blocks are pre-norm. With the default settings, the model is that of the AugReg checkpoints, as in
https://github.com/google-research/vision_transformer/blob/main/vit_jax/models_vit.py. LayerNorm has epsilon 1e-6, GELU
is the tanh approximation, and position embeddings are added after the class token is prepended. Other settings of the
configuration give the models of DeiT, DINOv2, CLIP and I-JEPA.

The suffix of a variable's name gives its dimensions, for example `images_bhwc`: b batch, h height, w width of the
image, c channels, t tokens, d width of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from surm_jax.errors import UserError
from surm_jax.models.base import (
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
)

POOLS = ("token", "mean", "patches", "token+patches")

# For each size of the model: its width, depth, number of heads and width of the MLP's hidden layer, from table 2 of
# https://arxiv.org/abs/2106.04560.
_SIZES = {"Ti": (192, 12, 3, 768), "S": (384, 12, 6, 1536), "B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096)}

_VARIANTS: dict[str, Mapping[str, Any]] = {
    f"{size}/{patch_size}": {
        "image_size": 224,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_width": mlp_width,
    }
    for size, (width, depth, heads, mlp_width) in _SIZES.items()
    for patch_size in (8, 14, 16, 32)
} | {
    # Two models that are small enough for a CPU: "mini" for CIFAR, "digits" for the 8 x 8 digits of scikit-learn.
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


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Config):
    """Configuration of a `ViT`: its sizes, its optional parts, and its dtypes.

    Raises:
        UserError: A size is not a positive integer, `heads` does not divide `width`, `patch_size` does not divide
            `image_size`, another value is not allowed, or there is a distillation token without a class token.

    The example has 14 x 14 patches, and 197 tokens because of the class token.

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
    # The input of the head, computed from the output of the last block:
    # "token": the output for the class token.
    # "mean": the mean over all patches, in a model without a class token.
    # "patches": the mean over all patches, in a model with a class token.
    # "token+patches": the output for the class token and the mean over all patches, concatenated.
    pool: str = "token"
    # Activation function of the MLP, one of surm_jax.models.ACTIVATIONS.
    activation: str = "gelu_tanh"
    # Epsilon of every LayerNorm.
    epsilon: float = 1e-6
    qkv_bias: bool = True
    patch_bias: bool = True
    # Whether there is a LayerNorm before the first block (CLIP).
    pre_norm: bool = False
    # Whether there is a LayerNorm after the last block.
    final_norm: bool = True
    # Whether the outputs of attention and MLP are multiplied by a trained vector, as in DINOv2 (arXiv 2103.17239).
    layer_scale: bool = False
    # Whether a distillation token follows the class token, as in DeiT (arXiv 2012.12877). The head does not use it.
    distillation: bool = False
    head_bias: bool = True
    # Probability of dropout after the position embeddings, between the layers of the MLP, and on the outputs of
    # attention and MLP.
    dropout: float = 0.0
    # Dtype of the computation. LayerNorms and logits are always computed in float32.
    dtype: str = "float32"
    # Dtype of the parameters. Those of LayerNorms, layer scales and the head are always float32.
    param_dtype: str = "float32"
    # Name of the rematerialisation policy, one of surm_jax.models.REMAT.
    remat: str = "none"

    VARIANTS: ClassVar[dict[str, Mapping[str, Any]]] = _VARIANTS
    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "dtype", "param_dtype", "remat")
    HEAD_FIELDS: ClassVar[tuple[str, ...]] = ("num_classes", "head_bias", "pool", "final_norm")

    def __post_init__(self):
        check_sizes(
            self, ("image_size", "patch_size", "channels", "width", "depth", "heads", "mlp_width", "num_classes")
        )
        check_heads(self)
        check_transformer(self)
        if self.image_size % self.patch_size:
            raise UserError(
                "ViTConfig.patch_size must divide the image size, "
                f"got patches of {self.patch_size} pixels for images of {self.image_size}"
            )
        check_choice(self, "pool", POOLS)
        check_choice(self, "activation", ACTIVATIONS)
        if self.distillation and self.pool == "mean":
            raise UserError("ViTConfig.distillation needs a class token, but pool='mean' has none")

    @property
    def grid(self) -> int:
        """Number of patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def extra_tokens(self) -> int:
        """Number of tokens before the patches: one for a class token and one for a distillation token, if present."""
        return (self.pool != "mean") + self.distillation

    @property
    def tokens(self) -> int:
        """Number of tokens for one image. There is one for each patch, in addition to the `extra_tokens`."""
        return self.extra_tokens + self.grid**2

    @property
    def position_grids(self) -> Mapping[str, int]:
        """The path of the position embeddings, and the number of tokens before the patches (see the base class)."""
        return {"position_embed": self.extra_tokens}


class Block(nnx.Module):
    """One pre-norm transformer block: `x = x + scale1 * attention(norm1(x))`, and then `x + scale2 * mlp(norm2(x))`.

    The vectors `scale1` and `scale2` exist only if `config.layer_scale` is true. Otherwise the factors are left out.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.norm1 = _norm(config, rngs)
        self.attention = Attention(config.width, config.heads, qkv_bias=config.qkv_bias, **options)
        self.norm2 = _norm(config, rngs)
        self.mlp = MLP(config.width, config.mlp_width, activation=config.activation, dropout=config.dropout, **options)
        self.dropout = nnx.Dropout(config.dropout)
        self.scale1 = nnx.Param(jnp.ones(config.width, jnp.float32)) if config.layer_scale else None
        self.scale2 = nnx.Param(jnp.ones(config.width, jnp.float32)) if config.layer_scale else None

    def __call__(self, x_btd: Float[Array, "b t d"], key: jax.Array | None) -> Float[Array, "b t d"]:
        """Return the output of the block.

        Args:
            x_btd: The features of the tokens.
            key: The random key of dropout. None turns dropout off.
        """
        attention_key, hidden_key, mlp_key = split_key(key, 3)
        # The norms return float32, but the dense layers and their adapters expect the dtype of x.
        y_btd = _scaled(self.attention(self.norm1(x_btd).astype(x_btd.dtype)), self.scale1)
        x_btd = x_btd + drop(self.dropout, y_btd, attention_key)
        y_btd = _scaled(self.mlp(self.norm2(x_btd).astype(x_btd.dtype), hidden_key), self.scale2)
        return x_btd + drop(self.dropout, y_btd, mlp_key)


@register_model
class ViT(Model):
    """Vision Transformer that classifies images.

    The parameters have the paths `patch_embed/{kernel,bias}`, `cls_token` (unless `pool="mean"`), `distillation_token`,
    `position_embed`, `pre_norm/{scale,bias}`, `blocks/<i>/{norm1,norm2}/{scale,bias}`,
    `blocks/<i>/attention/{query,key,value,out}/{kernel,bias}`, `blocks/<i>/mlp/{up,down}/{kernel,bias}`,
    `blocks/<i>/{scale1,scale2}`, `norm/{scale,bias}` and `head/{kernel,bias}`. Some of them exist only with certain
    settings of the configuration. The parameters are initialised as in google-research/vision_transformer. The head
    starts at zero, so a new model returns logits of zero.

    >>> config = ViTConfig.from_variant("digits", num_classes=10)
    >>> jax.eval_shape(lambda images: ViT(config, rngs=nnx.Rngs(0))(images), jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """

    config_class: ClassVar[type[Config]] = ViTConfig
    reads: ClassVar[str] = "images"
    adapter_targets: ClassVar[Mapping[str, str]] = TARGETS
    after_blocks: ClassVar[tuple[str, ...] | None] = ("norm",)

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        patch = (config.patch_size, config.patch_size)
        self.patch_embed = nnx.Conv(
            config.channels,
            config.width,
            kernel_size=patch,
            strides=patch,
            padding="VALID",
            use_bias=config.patch_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if config.pool != "mean":
            self.cls_token = nnx.Param(jnp.zeros((1, 1, config.width), param_dtype))
        if config.distillation:
            self.distillation_token = nnx.Param(jnp.zeros((1, 1, config.width), param_dtype))
        init_position = nnx.initializers.normal(stddev=0.02)
        self.position_embed = nnx.Param(init_position(rngs.params(), (1, config.tokens, config.width), param_dtype))
        self.dropout = nnx.Dropout(config.dropout)
        self.pre_norm = _norm(config, rngs) if config.pre_norm else None
        self.blocks = Blocks([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = _norm(config, rngs) if config.final_norm else None
        # The head is always float32, because rounding logits to bfloat16 would change the loss visibly.
        self.head = nnx.Linear(
            2 * config.width if config.pool == "token+patches" else config.width,
            config.num_classes,
            use_bias=config.head_bias,
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
        """Return the logits of the classes, in float32.

        Args:
            images_bhwc: Images of shape (batch, image_size, image_size, channels), with the sizes of the configuration.
                AugReg checkpoints expect values in [-1, 1].
            rngs: Random key of dropout, as a JAX key or as an `nnx.Rngs` with the stream `dropout`. None turns dropout
                off.

        Raises:
            UserError: The images do not have this shape.
        """
        key = dropout_key(rngs)
        embed_key, _ = split_block_keys(key, self.config.depth)
        return self.after(0, self._embed(images_bhwc, embed_key), rngs=key)

    def before(self, cut: int, inputs: Float[Array, "b h w c"], **options: Any) -> Array:
        """Return the state at a cut (see `Model.before`). The input of the head has the shape (b, d) or (b, 2 d)."""
        del options
        before_head = cut > self.config.depth
        blocks = self.blocks.between(0, None if before_head else cut)
        (x_btd,) = blocks.run(self._embed(inputs, None), keys=None, remat=self.config.remat, every=False)
        return self._pool(x_btd) if before_head else x_btd

    def after(self, cut: int, state: Array, *, rngs: Any = None, **options: Any) -> Array:
        """Return the logits, given the state at a cut (see `Model.after`)."""
        del options
        _, keys = split_block_keys(dropout_key(rngs), self.config.depth)
        if cut <= self.config.depth:
            keys = None if keys is None else keys[cut:]
            (state,) = self.blocks.between(cut, None).run(state, keys=keys, remat=self.config.remat, every=False)
            state = self._pool(state)
        return self.head(state)

    def hidden_states(
        self,
        images_bhwc: Float[Array, "b h w c"],
        *,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> tuple[Float[Array, "b t d"], ...]:
        """Return the input of the first block and the outputs of all blocks, `depth + 1` arrays of shape (b, t, d).

        The LayerNorm after the last block is not applied, as in the `hidden_states` of Hugging Face transformers.

        Args:
            images_bhwc: As in `__call__`.
            rngs: As in `__call__`.

        Raises:
            UserError: The images do not have the shape that the configuration requires.
        """
        embed_key, keys = split_block_keys(dropout_key(rngs), self.config.depth)
        x_btd = self._embed(images_bhwc, embed_key)
        return self.blocks.run(x_btd, keys=keys, remat=self.config.remat, every=True)

    def _embed(self, images_bhwc: Float[Array, "b h w c"], key: jax.Array | None) -> Float[Array, "b t d"]:
        """Return the input of the first block. The key is for dropout.

        Raises:
            UserError: The images do not have the shape that the configuration requires.
        """
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images_bhwc.ndim != 4 or images_bhwc.shape[1:] != expected:
            raise UserError(
                f"this ViT reads images of shape (batch, {', '.join(map(str, expected))}), got {images_bhwc.shape}"
            )
        x_btd = drop(self.dropout, self._tokens(images_bhwc), key)
        return x_btd if self.pre_norm is None else self.pre_norm(x_btd).astype(x_btd.dtype)

    def _tokens(self, images_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b t d"]:
        """Return the embeddings of all tokens, to which the position embeddings are added.

        The class token and the distillation token, if there are any, come before the patches.
        """
        patches_bhwd = self.patch_embed(images_bhwc)
        batch, width = patches_bhwd.shape[0], self.config.width
        patches_btd = patches_bhwd.reshape(batch, self.config.grid**2, width)
        extra = [self.cls_token] if self.config.pool != "mean" else []
        extra += [self.distillation_token] if self.config.distillation else []
        tokens = [jnp.broadcast_to(token[...].astype(patches_btd.dtype), (batch, 1, width)) for token in extra]
        x_btd = jnp.concatenate([*tokens, patches_btd], axis=1)
        return x_btd + self.position_embed[...].astype(x_btd.dtype)

    def _pool(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """Return the input of the head, for example the features of the class token, as `config.pool` says.

        Args:
            x_btd: The output of the last block.
        """
        x_btd = x_btd.astype(jnp.float32) if self.norm is None else self.norm(x_btd)
        if self.config.pool == "token":
            return x_btd[:, 0]
        mean_bd = x_btd[:, self.config.extra_tokens :].mean(axis=1)
        return jnp.concatenate([x_btd[:, 0], mean_bd], axis=1) if self.config.pool == "token+patches" else mean_bd


def _norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Compute the variance in two passes, as PyTorch does. The fast formula E[x^2] - E[x]^2 loses digits if the mean is
    # large.
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def _scaled(y_btd: Float[Array, "b t d"], scale: nnx.Param | None) -> Float[Array, "b t d"]:
    """Return `y_btd` times the vector `scale`, or `y_btd` itself if `scale` is None."""
    return y_btd if scale is None else y_btd * scale[...].astype(y_btd.dtype)[None, None]
