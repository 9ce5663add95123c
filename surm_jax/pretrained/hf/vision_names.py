"""The names that transformers gives to the modules of Vision Transformers, each with its path in our `ViT`.

They are the names in checkpoints on the Hub, which every version of transformers writes. Where the attribute path in a
model that transformers 5.24 has loaded differs, it is listed as an alias.
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np

from surm_jax.models.vit import ViTConfig
from surm_jax.pretrained.hf.architecture import ARRAY, CONV, LINEAR, LINEAR_OUT, NORM, VECTOR, Name, Tensor
from surm_jax.pretrained.position_embed import resize_position_embed_bicubic

_LAYOUTS = {
    "norm1": NORM,
    "attention/query": LINEAR,
    "attention/key": LINEAR,
    "attention/value": LINEAR,
    "attention/out": LINEAR_OUT,
    "norm2": NORM,
    "mlp/up": LINEAR,
    "mlp/down": LINEAR,
    "scale1": ARRAY,
    "scale2": ARRAY,
}


def _blocks(stem: str, names: Mapping[str, str], alias_stem: str, aliases: Mapping[str, str]) -> tuple[Name, ...]:
    """Return the names of the modules and arrays of a block.

    Args:
        stem: The beginning of their names in checkpoints, with `#` for the number of the block.
        names: The rest of their names in checkpoints, by their paths within our block.
        alias_stem: The beginning of their attribute paths in a loaded transformers model.
        aliases: The rest of the attribute paths, by their paths within our block. An entry may be left out if it equals
            the entry in `names`.
    """
    found = []
    for ours, theirs in names.items():
        checkpoint, memory = f"{stem}.{theirs}", f"{alias_stem}.{aliases.get(ours, theirs)}"
        other = (memory,) if memory != checkpoint else ()
        found.append(Name(checkpoint, f"blocks/#/{ours}", _LAYOUTS[ours], aliases=other))
    return tuple(found)


_ATTENTION = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
}
_ATTENTION_ALIASES = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
}
_EMBEDDINGS = (
    Name("embeddings.patch_embeddings.projection", "patch_embed", CONV),
    Name("embeddings.cls_token", "cls_token", ARRAY),
    Name("embeddings.distillation_token", "distillation_token", ARRAY),
    Name("layernorm", "norm", NORM),
)
_VIT_NAMES = (
    *_EMBEDDINGS,
    *_blocks(
        "encoder.layer.#",
        {
            **_ATTENTION,
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp/up": "intermediate.dense",
            "mlp/down": "output.dense",
        },
        "layers.#",
        {**_ATTENTION_ALIASES, "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"},
    ),
)
_DINOV2_NAMES = (
    *_EMBEDDINGS,
    *_blocks(
        "encoder.layer.#",
        {
            **_ATTENTION,
            "norm1": "norm1",
            "norm2": "norm2",
            "mlp/up": "mlp.fc1",
            "mlp/down": "mlp.fc2",
            "scale1": "layer_scale1.lambda1",
            "scale2": "layer_scale2.lambda1",
        },
        "encoder.layer.#",
        _ATTENTION_ALIASES,
    ),
)
_CLIP_NAMES = (
    Name("embeddings.patch_embedding", "patch_embed", CONV),
    Name("embeddings.class_embedding", "cls_token", VECTOR),
    Name("pre_layrnorm", "pre_norm", NORM),
    Name("post_layernorm", "norm", NORM),
    *_blocks(
        "encoder.layers.#",
        {
            "attention/query": "self_attn.q_proj",
            "attention/key": "self_attn.k_proj",
            "attention/value": "self_attn.v_proj",
            "attention/out": "self_attn.out_proj",
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "mlp/up": "mlp.fc1",
            "mlp/down": "mlp.fc2",
        },
        "encoder.layers.#",
        {},
    ),
)


def vit_names(config: ViTConfig) -> tuple[Name, ...]:
    """Return the names of the modules and arrays of ViT, DeiT and I-JEPA.

    The class token and the distillation token are always listed, although a model may lack them.
    """
    return (*_VIT_NAMES, *_head_and_positions(config))


def dinov2_names(config: ViTConfig) -> tuple[Name, ...]:
    """Return how transformers names the modules and arrays of a DINOv2 model."""
    return (*_DINOV2_NAMES, *_head_and_positions(config))


def _head_and_positions(config: ViTConfig) -> tuple[Name, ...]:
    resize = partial(resize_position_embed_bicubic, extra_tokens=config.extra_tokens)
    positions = Tensor("", "", resize, lambda array: array)
    return (
        Name("embeddings.position_embeddings", "position_embed", (positions,)),
        Name("classifier", "head", LINEAR, in_body=False),
    )


def clip_names(config: ViTConfig) -> tuple[Name, ...]:
    """Return the names of the modules and arrays of CLIP's image encoder.

    Its head is a classifier if the model averages its patches, and otherwise the projection into the space that images
    and texts share.
    """

    def read(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return resize_position_embed_bicubic(table[None], shape, extra_tokens=config.extra_tokens)

    positions = Tensor("weight", "", read, lambda array: array[0])
    head = "classifier" if config.pool == "patches" else "visual_projection"
    return (
        *_CLIP_NAMES,
        Name("embeddings.position_embedding", "position_embed", (positions,)),
        Name(head, "head", LINEAR, in_body=False),
    )


def clip_ignore(config: ViTConfig) -> tuple[str, ...]:
    """Return regular expressions for the keys of a CLIP checkpoint that are not read.

    They match the text encoder, the loss, heads and norms that the model does not use, and arrays that only old
    versions of transformers stored.
    """
    ignored = [r"text_model\..*", r"text_projection\.weight", "logit_scale", r"embeddings\.position_ids"]
    if config.pool == "patches":
        ignored.append(r"visual_projection\.weight")
    if not config.final_norm:
        ignored.append(r"post_layernorm\.(weight|bias)")
    return tuple(ignored)


def clip_fillers(config: ViTConfig) -> dict[str, np.ndarray]:
    """Return the arrays that a checkpoint of transformers must hold although our model has none.

    `CLIPForImageClassification` stores a norm after the last block, but does not use it. If our model has this norm,
    nothing is missing, and the result is empty.
    """
    if config.final_norm:
        return {}
    ones = np.ones(config.width, np.float32)
    return {"vision_model.post_layernorm.weight": ones, "vision_model.post_layernorm.bias": np.zeros_like(ones)}


def dinov2_fillers(config: ViTConfig) -> dict[str, np.ndarray]:
    """Return an array of zeros for the mask token, which checkpoints of DINOv2 hold but only its pretraining uses."""
    return {"dinov2.embeddings.mask_token": np.zeros((1, config.width), jnp.dtype(config.param_dtype))}
