"""The sections `config.model` and `config.data`: every key, what it means, its default, its unit, and its check.

`surm_jax/training/config.py` documents the other sections and puts all of them together.
"""

import dataclasses
import typing

from surm_jax.data import Augment
from surm_jax.errors import UserError, require_one_of
from surm_jax.models import REMAT, variant_names
from surm_jax.models.base import DTYPES

GEOMETRY = ("image_size", "patch_size", "width", "depth", "heads", "mlp_width")
"""Fields of `ModelConfig` that override the geometry of the variant or the checkpoint, unless they are 0."""


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise a `UserError` unless the value of a key is at least `least`."""
    if not value >= least:
        raise UserError(f"config.{key} must be at least {least}, got {value}")


def check_fraction(key: str, value: float) -> None:
    """Raise a `UserError` unless the value of a key lies in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"config.{key} must lie in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model: its architecture, its weights, and its precision."""

    # The model by name: "Ti/16", "S/16", "B/16" or another ViT for images, "base" or another BERT for text. Empty: read
    # the architecture from the checkpoint, which must then be a folder of transformers or hf://owner/name.
    variant: str = "B/16"
    # The pretrained weights:
    #   "augreg"           the official AugReg file of the variant (ViT, ImageNet-21k), downloaded once;
    #   "digits"           the small ViT that is part of this package;
    #   "hf://owner/name"  a model of the Hugging Face Hub, downloaded once;
    #   a path or a URL    a file of weights, or a folder that transformers wrote;
    #   "none"             random weights.
    # A text model reads its tokeniser from the same folder.
    checkpoint: str = "augreg"
    # Number of outputs of the new head. 0: one for each class of the data set, or a single one if the labels are
    # numbers, as in regression.
    num_classes: int = 0
    # Geometry. 0: keep the value of the variant or the checkpoint. Text models have no image_size and no patch_size.
    image_size: int = 0  # Height and width of the input image, in pixels.
    patch_size: int = 0  # Height and width of a patch, in pixels.
    width: int = 0  # Number of features of a token.
    depth: int = 0  # Number of transformer blocks.
    heads: int = 0  # Number of attention heads in each block.
    mlp_width: int = 0  # Number of hidden features in the MLP of each block.
    # Dropout in the base model while training: the probability of dropping an activation, in [0, 1). An adapter has its
    # own dropout, a setting of its method such as peft.lora.dropout.
    dropout: float = 0.0
    # Dtype of activations and products: "float32" or "bfloat16".
    dtype: str = "float32"
    # Dtype of the frozen weights: "float32" or "bfloat16". Trained parameters are always float32.
    param_dtype: str = "float32"
    # Rematerialisation: which activations of a block are recomputed in the backward pass, which saves memory and takes
    # time: "none", "block" (all of them), or "dots" (all except the outputs of linear layers).
    remat: str = "none"
    # True: compile equal neighbouring blocks once, and run them in a scan. A deep model then compiles as fast as a
    # shallow one. Results are the same up to rounding.
    scan_layers: bool = False

    def __post_init__(self):
        if self.variant:
            require_one_of("config.model.variant", self.variant, variant_names())
        require_one_of("config.model.dtype", self.dtype, DTYPES)
        require_one_of("config.model.param_dtype", self.param_dtype, DTYPES)
        require_one_of("config.model.remat", self.remat, REMAT)
        for name in ("num_classes", *GEOMETRY):
            check_at_least(f"model.{name}", getattr(self, name), 0)
        check_fraction("model.dropout", self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set and its batches."""

    # The data set: "digits_5to9" (part of this package), a set of TensorFlow Datasets such as "cifar10" or "glue/rte",
    # or the path of an .npz file with your own images. The docstring of `surm_jax.data.load` lists all forms.
    name: str = "cifar10"
    # The folder that holds prepared sets of TensorFlow Datasets. Empty: $TFDS_DATA_DIR if it is set, otherwise
    # ~/tensorflow_datasets.
    dir: str = ""
    # The classes of images to keep, by name, two or more. They are numbered in this order. Empty: all classes. On the
    # command line: --config.data.classes="('cat','dog')".
    classes: tuple[str, ...] = ()
    # Number of training examples to use. 0: all. Every run with the same number uses the same examples, and a smaller
    # number uses a subset of those of a larger one.
    train_examples: int = 0
    # Augmentation of training images: "none", "affine" (small random rotations, shears, shifts and scalings, for digits
    # and letters on black), or "crop_flip" (a random crop, flipped horizontally half of the time).
    augment: str = "crop_flip"
    # The lengths that a batch of text can have, in tokens, increasing. A batch is padded to the smallest of them that
    # its longest text fits in. A text longer than the last one is cut off there. The training step is compiled once for
    # each length that occurs.
    lengths: tuple[int, ...] = (16, 32, 64, 96, 128)
    # Number of training examples to hold out for validation. They are evaluated during training, and the test set only
    # once, at the end. 0: hold out none, and evaluate the test set during training.
    holdout: int = 0
    # How many images of each split may be unreadable. Up to this many are skipped: each is named in a warning, and
    # the result counts them. One more is an error.
    max_corrupt: int = 0
    # Number of training examples per update, in total over all devices and all accumulated micro-batches.
    batch_size: int = 64
    # Number of examples per batch in evaluations. It affects speed and memory, not the result.
    eval_batch_size: int = 256

    def __post_init__(self):
        require_one_of("config.data.augment", self.augment, typing.get_args(Augment))
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise UserError(f"config.data.lengths must be positive and increase, got {self.lengths}")
        if len(self.classes) == 1:
            raise UserError(
                f"config.data.classes must name two or more, such as \"('cat','dog')\", got {self.classes[0]!r} only"
            )
        for name in ("train_examples", "holdout", "max_corrupt"):
            check_at_least(f"data.{name}", getattr(self, name), 0)
        for name in ("batch_size", "eval_batch_size"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
