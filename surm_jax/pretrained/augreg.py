"""Read AugReg checkpoints, the official `.npz` files of "How to train your ViT?" (arXiv 2106.10270).

Other `.npz` files of Vision Transformers can be read too, if their arrays have the same names and shapes. Every array
has the shape of our parameter, such as (width, heads, width / heads) for the query kernel of attention. So no array is
converted, except that position embeddings are resized if the model has another image size.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from surm_jax.errors import UserError
from surm_jax.files import Npz
from surm_jax.models import ViTConfig
from surm_jax.pretrained.checkpoint import Checkpoint
from surm_jax.pretrained.position_embed import resize_position_embed
from surm_jax.pretrained.rules import KeyRule, fill

_BUCKET = "https://storage.googleapis.com/vit_models/augreg/"

# The recommended ImageNet-21k checkpoints ("howto-i21k" in
# https://github.com/google-research/big_vision/blob/main/big_vision/models/vit.py).
AUGREG_URLS: Mapping[str, str] = {
    "Ti/16": _BUCKET + "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
    "S/32": _BUCKET + "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0.npz",
    "S/16": _BUCKET + "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz",
    "B/32": _BUCKET + "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0.npz",
    "B/16": _BUCKET + "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz",
    "B/8": _BUCKET + "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0.npz",
    "L/16": _BUCKET + "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0.npz",
}
"""The URLs of the official checkpoints, by the name of the ViT variant.

All of them were pretrained on ImageNet-21k, with images of 224 x 224 pixels that were scaled to [-1, 1].
"""

_BLOCK = r"Transformer/encoderblock_(\d+)/"

RULES = (
    KeyRule(r"embedding/(kernel|bias)", r"patch_embed/\1"),
    KeyRule(r"cls", r"cls_token"),
    KeyRule(r"Transformer/posembed_input/pos_embedding", r"position_embed", resize_position_embed),
    KeyRule(_BLOCK + r"LayerNorm_0/(scale|bias)", r"blocks/\1/norm1/\2"),
    KeyRule(
        _BLOCK + r"MultiHeadDotProductAttention_1/(query|key|value|out)/(kernel|bias)",
        r"blocks/\1/attention/\2/\3",
    ),
    KeyRule(_BLOCK + r"LayerNorm_2/(scale|bias)", r"blocks/\1/norm2/\2"),
    KeyRule(_BLOCK + r"MlpBlock_3/Dense_0/(kernel|bias)", r"blocks/\1/mlp/up/\2"),
    KeyRule(_BLOCK + r"MlpBlock_3/Dense_1/(kernel|bias)", r"blocks/\1/mlp/down/\2"),
    KeyRule(r"Transformer/encoder_norm/(scale|bias)", r"norm/\1"),
    KeyRule(r"head/(kernel|bias)", r"head/\1"),
)

# The values that these fields of `ViTConfig` have for all models in this format. The files do not record them.
_NUMERICS = {"activation": "gelu_tanh", "epsilon": 1e-6}


class AugRegCheckpoint(Checkpoint):
    """An open `.npz` file in the AugReg format. Pickled arrays are refused."""

    def __init__(self, path: Path, file: Npz) -> None:
        self.path, self._file = path, file

    def config(self, variant: str | None, overrides: Mapping[str, Any]) -> ViTConfig:
        """Return the configuration of a ViT variant, with fields replaced by the overrides.

        The file itself holds no configuration, so the variant and the override `num_classes` are required.
        """
        if variant is None or "num_classes" not in overrides:
            raise UserError(
                f"{self.path} holds no configuration, as no .npz file does: give variant=, such as 'B/16', and "
                "num_classes="
            )
        return ViTConfig.from_variant(variant, **overrides)

    def fill(
        self, config: Any, targets: Mapping[str, jax.ShapeDtypeStruct], fresh: Collection[str]
    ) -> dict[str, jax.Array]:
        """Read the parameters of a `ViT` from the file.

        Position embeddings are resized to the model's image size. The arrays of the class token are ignored if the
        model has none, and those of the layer before the head (`pre_logits`) if the head is not read.

        Raises:
            UserError: The file is damaged, holds pickles or does not fit the model, or the model has another activation
                or another epsilon in its norms than all models in this format.
        """
        if not isinstance(config, ViTConfig):
            raise UserError(f"{self.path} holds a ViT, not a model of {type(config).__name__}")
        different = [
            f"{name} is {value!r} in such files and {getattr(config, name)!r} in the model"
            for name, value in _NUMERICS.items()
            if getattr(config, name) != value
        ]
        if different:
            raise UserError(f"{self.path} has the AugReg layout, but belongs to another model: {'; '.join(different)}")
        ignore = []
        if "head/kernel" not in targets:
            # The head in the file takes the output of `pre_logits`, a layer that our model lacks. If the head is read,
            # this key is not ignored, so that an error is raised instead of computing wrong logits.
            ignore.append(r"pre_logits/.*")
        if "cls_token" not in targets and "cls_token" not in fresh:
            ignore.append(r"cls")
        file = self._file
        return fill(file.keys, file.read, targets, RULES, ignore=ignore, fresh=fresh, origin=str(self.path))
