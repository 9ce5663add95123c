"""A small image classifier that is not part of the package, complete in one file.

Importing this file registers the model and its configuration. It also registers the names of the model's modules in
folders of transformers, so that such folders can be read and written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from surm_jax.models import Blocks, Config, Model, register_model
from surm_jax.preparation import Normalization
from surm_jax.pretrained.hf import CONV, LINEAR, Architecture, Name, register_architecture


@dataclass(frozen=True, kw_only=True)
class PatchMixerConfig(Config):
    """The configuration of a `PatchMixer`, such as its sizes and dtypes."""

    num_classes: int
    image_size: int = 8
    channels: int = 1
    patch_size: int = 4
    width: int = 6
    depth: int = 2
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"

    VARIANTS: ClassVar[dict[str, Mapping[str, Any]]] = {"patch-mixer": {"width": 8}}
    RUNTIME_FIELDS: ClassVar[tuple[str, ...]] = ("dropout", "dtype", "param_dtype", "remat")


class Layer(nnx.Module):
    """A residual layer that computes `x + relu(x W + b)` with the kernel W and the bias b of `dense`."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return x + jax.nn.relu(self.dense(x))


@register_model
class PatchMixer(Model):
    """A network that embeds the patches of an image, applies the layers to each patch, and classifies their mean."""

    config_class: ClassVar[type[Config]] = PatchMixerConfig
    reads: ClassVar[str] = "images"
    adapter_targets: ClassVar[Mapping[str, str]] = {"qkv": r"blocks/\d+/dense"}

    def __init__(self, config: PatchMixerConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch = (config.patch_size, config.patch_size)
        self.patches = nnx.Conv(config.channels, config.width, patch, strides=patch, padding="VALID", rngs=rngs)
        self.blocks = Blocks([Layer(config.width, rngs=rngs) for _ in range(config.depth)])
        self.head = nnx.Linear(config.width, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | jax.Array | None = None) -> jax.Array:
        """Return the float32 logits of images. `rngs` is ignored, because the network has no dropout."""
        x = self.patches(images).reshape(len(images), -1, self.config.width)
        x = self.blocks.run(x, keys=None, remat=self.config.remat, every=False)[-1]
        return self.head(x.mean(axis=1)).astype(jnp.float32)


GREY = Normalization((0.5,), (0.25,))
_FIELDS = {"image_size": "image_size", "channels": "num_channels", "patch_size": "patch", "width": "hidden_size"}


def _read_config(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> PatchMixerConfig:
    ours = {name: fields[theirs] for name, theirs in _FIELDS.items()}
    ours |= {"depth": fields["num_layers"], "num_classes": fields["num_labels"]}
    return PatchMixerConfig.build(ours, overrides)


def _write_config(config: PatchMixerConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, name) for name, theirs in _FIELDS.items()}
    return {"model_type": "patch_mixer", **fields, "num_layers": config.depth, "num_labels": config.num_classes}


_NAMES = (
    Name("embed", "patches", CONV),
    Name("mixer.#.dense", "blocks/#/dense", LINEAR),
    Name("classifier", "head", LINEAR, in_body=False),
)

register_architecture(
    Architecture(
        model_type="patch_mixer",
        prefix="body.",
        model=PatchMixer,
        read_config=_read_config,
        write_config=_write_config,
        names=lambda config: _NAMES,
        normalization=GREY,
    )
)
