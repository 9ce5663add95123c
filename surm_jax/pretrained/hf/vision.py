"""Register the Vision Transformers of transformers: ViT, DeiT, DINOv2, I-JEPA, and the image encoder of CLIP.

Each of these classes fixes some fields of `ViTConfig`, such as `pool` = "mean" for I-JEPA. So these fields of a `ViT`
determine the class that it is written as.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.preparation import Normalization
from surm_jax.pretrained.hf.architecture import (
    ACTIVATIONS,
    Architecture,
    our_activation,
    refusal,
    register_architecture,
)
from surm_jax.pretrained.hf.vision_names import (
    clip_fillers,
    clip_ignore,
    clip_names,
    dinov2_fillers,
    dinov2_names,
    vit_names,
)
from surm_jax.pretrained.image_processor import CLIP, HALF, IMAGENET

_VIT = {
    "pool": "token",
    "patch_bias": True,
    "pre_norm": False,
    "final_norm": True,
    "layer_scale": False,
    "distillation": False,
    "head_bias": True,
}
_CLIP = {**_VIT, "qkv_bias": True, "patch_bias": False, "pre_norm": True}

_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ViTForImageClassification": ("vit", _VIT),
    "DeiTForImageClassification": ("deit", {**_VIT, "distillation": True}),
    "Dinov2ForImageClassification": ("dinov2", {**_VIT, "pool": "token+patches", "layer_scale": True}),
    "IJepaForImageClassification": ("ijepa", {**_VIT, "pool": "mean"}),
    "CLIPForImageClassification": ("clip", {**_CLIP, "pool": "patches", "final_norm": False}),
    "CLIPVisionModelWithProjection": ("clip_vision_model", {**_CLIP, "head_bias": False}),
}
"""For each class of transformers, its `model_type`, and the fields of `ViTConfig` that are equal in all its models."""

_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "epsilon": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
    "dropout": "hidden_dropout_prob",
}
"""The names of our fields, mapped to those fields of `config.json` that have the same values."""

# The values that transformers uses for fields that are missing in config.json.
_VIT_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "hidden_act": "gelu",
}
_CLIP_DEFAULTS = {
    **_VIT_DEFAULTS,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "projection_dim": 512,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "vit": _VIT_DEFAULTS,
    "deit": _VIT_DEFAULTS,
    "dinov2": {**_VIT_DEFAULTS, "patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4.0},
    "ijepa": _VIT_DEFAULTS,
    "clip": _CLIP_DEFAULTS,
    "clip_vision_model": _CLIP_DEFAULTS,
}

_POOLER = r"pooler\.dense\.(weight|bias)"


def _read_config(model_type: str, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> ViTConfig:
    """Convert the content of a `config.json` to our configuration.

    A model of CLIP has the head of `CLIPForImageClassification` if `architectures` names that class. Otherwise its head
    is the projection of the class token into the space that images and texts share. `hidden_dropout_prob` becomes the
    dropout rate of all layers. The dropout rate of attention probabilities and stochastic depth are ignored, since they
    do not change what a trained model computes.

    Raises:
        UserError: The file describes a model that `ViT` cannot represent, or an override is not a field of `ViTConfig`.
    """
    known = _known(model_type, fields)
    if known.get("use_swiglu_ffn"):
        raise refusal(model_type, "use_swiglu_ffn", True, "our MLP has two layers and no gate")
    activation = our_activation(model_type, known["hidden_act"])
    name = _read_as(model_type, known)
    if name == "CLIPVisionModelWithProjection":
        num_classes = known["projection_dim"]
    else:
        num_classes = len(known["id2label"]) if "id2label" in known else known.get("num_labels", 2)
    ours = {
        **{ours: known[theirs] for ours, theirs in _FIELDS.items()},
        "activation": activation,
        "num_classes": num_classes,
        **_CLASSES[name][1],
    }
    config = ViTConfig.build(ours, overrides)
    if known.get("head_dim", config.width // config.heads) != config.width // config.heads:
        what = f"our heads have hidden_size / num_attention_heads = {config.width // config.heads} features"
        raise refusal(model_type, "head_dim", known["head_dim"], what)
    return config


def _known(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `config.json` that describe the image model, with defaults for missing ones."""
    given = {name: value for name, value in fields.items() if value is not None}
    if model_type == "clip":
        # Old files have the fields of the image model in `vision_config_dict`. If it exists, it takes precedence.
        section = "vision_config_dict" if "vision_config_dict" in given else "vision_config"
        _check_type(model_type, section, given.setdefault(section, {}), Mapping)
        own = ("architectures", "projection_dim", "id2label", "num_labels")
        given = {**given[section], **{name: given[name] for name in own if name in given}}
    if model_type.startswith("clip"):
        # The CLIP of transformers ignores fields with these names.
        given = {name: value for name, value in given.items() if name not in ("qkv_bias", "hidden_dropout_prob")}
    known = {**_DEFAULTS[model_type], **given}
    for name, default in _DEFAULTS[model_type].items():
        if name in ("image_size", "patch_size"):
            known[name] = _side(model_type, name, known[name])
        _check_type(model_type, name, known[name], int | float if isinstance(default, float) else type(default))
    _check_type(model_type, "id2label", known.get("id2label", {}), Mapping)
    if model_type == "dinov2":
        known["intermediate_size"] = int(known["hidden_size"] * known["mlp_ratio"])
    return known


def _check_type(model_type: str, name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise refusal(model_type, name, value, f"that must be {getattr(kind, '__name__', 'a number')}")


def _read_as(model_type: str, known: Mapping[str, Any]) -> str:
    """Return the name of the class of transformers that reads a checkpoint. It is a key of `_CLASSES`."""
    if model_type == "clip" and "CLIPForImageClassification" not in known.get("architectures", ()):
        return "CLIPVisionModelWithProjection"
    return next(name for name, (its_type, _) in _CLASSES.items() if its_type == model_type)


def _side(model_type: str, name: str, value: Any) -> Any:
    """Return the side of square images or patches from a value in a file: a number, or a list of height and width."""
    if not isinstance(value, list | tuple):
        return value
    if not value or any(side != value[0] for side in value):
        raise refusal(model_type, name, value, "our images and patches are square")
    return value[0]


def _class_of(config: ViTConfig) -> str:
    """Return the class of transformers, a key of `_CLASSES`, that a model is written as.

    Raises:
        UserError: transformers has no such model. The message names the most similar class and the fields that differ.
    """
    different = {
        name: {field: value for field, value in fixed.items() if getattr(config, field) != value}
        for name, (_, fixed) in _CLASSES.items()
    }
    nearest = min(different, key=lambda name: len(different[name]))
    if different[nearest]:
        theirs = ", ".join(f"{field}={value!r}" for field, value in different[nearest].items())
        ours = ", ".join(f"{field}={getattr(config, field)!r}" for field in different[nearest])
        raise UserError(
            f"transformers has no such ViT: the nearest, {nearest}, has {theirs}, the model has {ours}. Build the model"
            " with these fields, or write it with save_model"
        )
    return nearest


def _write_config(model_type: str, config: ViTConfig) -> dict[str, Any]:
    """Convert our configuration to the content of a `config.json`.

    It holds the number of classes, but not their names.

    Raises:
        UserError: transformers has no such model, or has it under another `model_type`.
    """
    name = _class_of(config)
    if _CLASSES[name][0] != model_type:
        raise UserError(f"transformers' {model_type} has no such model: {name} is a {_CLASSES[name][0]}")
    ours = {theirs: getattr(config, field) for field, theirs in _FIELDS.items()}
    ours["hidden_act"] = next(theirs for theirs, field in ACTIVATIONS.items() if field == config.activation)
    if model_type == "dinov2":
        ours["mlp_ratio"], rest = divmod(ours.pop("intermediate_size"), config.width)
        if rest or not ours["mlp_ratio"]:
            raise UserError(
                "transformers' dinov2 has an MLP whose width is a whole multiple of the model's, not "
                f"{config.mlp_width} for {config.width}"
            )
    if model_type.startswith("clip"):
        del ours["qkv_bias"], ours["hidden_dropout_prob"]
    head = {"num_labels": config.num_classes}
    if model_type == "clip_vision_model":
        head = {"projection_dim": config.num_classes}
    if model_type == "clip":
        ours = {"vision_config": {"model_type": "clip_vision_model", **ours}}
    return {"architectures": [name], "model_type": model_type, **ours, **head}


def _register(model_type: str, prefix: str, normalization: Normalization, **parts: Any) -> None:
    register_architecture(
        Architecture(
            model_type=model_type,
            prefix=prefix,
            model=ViT,
            read_config=partial(_read_config, model_type),
            write_config=partial(_write_config, model_type),
            chosen=lambda config: _CLASSES[_class_of(config)][0] == model_type,
            normalization=normalization,
            **parts,
        )
    )


def _ignoring(*patterns: str) -> Callable[[ViTConfig], tuple[str, ...]]:
    return lambda config: patterns


# The normalisation that the published models expect. For DeiT, I-JEPA and DINOv2 it differs from the default of their
# image processors in transformers.
_register("vit", "vit.", HALF, names=vit_names, ignore=_ignoring(_POOLER))
# DeiTForImageClassificationWithTeacher has one head for the class token and one for the distillation token. Our model
# has a single head.
_DEIT_HEADS = r"(cls|distillation)_classifier\.(weight|bias)"
_register(
    "deit", "deit.", IMAGENET, processor="DeiTImageProcessor", names=vit_names, ignore=_ignoring(_POOLER, _DEIT_HEADS)
)
_MASK_TOKEN = r"embeddings\.mask_token"
_register(
    "dinov2",
    "dinov2.",
    IMAGENET,
    processor="BitImageProcessor",
    names=dinov2_names,
    ignore=_ignoring(_MASK_TOKEN),
    fillers=dinov2_fillers,
)
_register("ijepa", "ijepa.", IMAGENET, names=vit_names, ignore=_ignoring(_POOLER))
for _model_type in ("clip", "clip_vision_model"):
    _register(
        _model_type,
        "vision_model.",
        CLIP,
        processor="CLIPImageProcessor",
        names=clip_names,
        ignore=clip_ignore,
        fillers=clip_fillers,
    )
