"""The sections of the configuration that a task reads: the model, and the data.

`surm_jax.training.config` composes them with the other sections into the configuration of a run.
"""

import dataclasses
import typing

from surm_jax.data import Augment
from surm_jax.errors import UserError, require_one_of
from surm_jax.models import REMAT, variant_names
from surm_jax.models.base import DTYPES

GEOMETRY = ("image_size", "patch_size", "width", "depth", "heads", "mlp_width")
"""Fields of `ModelConfig` that replace those of the variant or the checkpoint, unless they are 0."""


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise a `UserError` unless the value of a key is a number of at least `least`."""
    if not value >= least:
        raise UserError(f"config.{key} must be at least {least}, got {value}")


def check_fraction(key: str, value: float) -> None:
    """Raise a `UserError` unless the value of a key lies in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"config.{key} must lie in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model: which one, where its weights are, and how it is computed."""

    # The name of a registered model: "Ti/16", "S/16", "B/16" or another ViT for images, "base" or another BERT for
    # text. Empty: the checkpoint says which model it holds (a folder of transformers, or hf://owner/name).
    variant: str = "B/16"
    # Where the pretrained weights come from:
    #   "augreg"           the official file of the variant, downloaded once (ViT, ImageNet-21k);
    #   "digits"           the small ViT that is shipped with this package;
    #   "hf://owner/name"  the Hugging Face Hub, downloaded once;
    #   a path or a URL    a file of weights, or a folder that transformers wrote;
    #   "none"             random weights.
    # The tokeniser of a text model is read from the same folder.
    checkpoint: str = "augreg"
    # Number of outputs of the new head. 0: one for each class of the data set, or one if its labels are numbers.
    num_classes: int = 0
    # Geometry. 0 keeps the value of the variant or the checkpoint. A text model has neither image_size nor patch_size.
    image_size: int = 0  # Side of the square input, in pixels.
    patch_size: int = 0  # Side of a square patch, in pixels.
    width: int = 0  # Features of a token.
    depth: int = 0  # Number of blocks.
    heads: int = 0  # Attention heads of a block.
    mlp_width: int = 0  # Hidden features of a block's MLP.
    # Probability of dropping an activation of the base model in training, in [0, 1). The dropout of an adapter is a
    # setting of its method, such as peft.lora.dropout.
    dropout: float = 0.0
    # Dtype of the computation: "float32" or "bfloat16".
    dtype: str = "float32"
    # Dtype of the frozen weights: "float32" or "bfloat16". Trained numbers are always float32.
    param_dtype: str = "float32"
    # Which activations of a block are computed again in the backward pass instead of being kept in memory: "none",
    # "block" (all of them), or "dots" (all but the outputs of linear layers).
    remat: str = "none"
    # True: compile equal blocks once and scan over them. A deep model then compiles as fast as a shallow one. Results
    # are the same up to rounding.
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

    # Which data set: "digits_5to9" (shipped with this package), a set of TensorFlow Datasets such as "cifar10" or
    # "glue/rte", or the path of an .npz file with your own images. `surm_jax.data.load` lists all forms.
    name: str = "cifar10"
    # The folder of prepared sets of TensorFlow Datasets. Empty: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    dir: str = ""
    # Names of the classes of images to keep, two or more; labels count them in this order. Empty: all classes. On the
    # command line: --config.data.classes="('cat','dog')".
    classes: tuple[str, ...] = ()
    # Number of training examples to use. The choice is the same in every run, and a smaller choice is part of every
    # larger one. 0: all.
    train_examples: int = 0
    # Augmentation of training images: "none", "affine" (small turns, shears, shifts and scalings, for digits and
    # letters on black), or "crop_flip" (a random crop, mirrored half of the time).
    augment: str = "crop_flip"
    # Lengths in tokens of batches of text, increasing. A batch is padded to the smallest length that holds its longest
    # text; longer texts are cut off at the last length. The step is compiled once for each length that occurs.
    lengths: tuple[int, ...] = (16, 32, 64, 96, 128)
    # Number of training examples to hold out. They are evaluated while training, instead of the test set, which is then
    # evaluated once, at the end. 0: none; the test set is evaluated while training.
    holdout: int = 0
    # Number of images per split that may be skipped because they cannot be read. Each one is named, and the result
    # counts them.
    max_corrupt: int = 0
    # Number of training examples per update, over all devices and all accumulated micro-batches.
    batch_size: int = 64
    # Number of examples per batch of an evaluation. It changes the speed and the memory, not the result.
    eval_batch_size: int = 256

    def __post_init__(self):
        require_one_of("config.data.augment", self.augment, typing.get_args(Augment))
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise UserError(f"config.data.lengths must be positive and increase, got {self.lengths}")
        if len(self.classes) == 1:
            raise UserError(
                f"config.data.classes must name two or more, such as \"('cat','dog')\", got {self.classes[0]!r} alone"
            )
        for name in ("train_examples", "holdout", "max_corrupt"):
            check_at_least(f"data.{name}", getattr(self, name), 0)
        for name in ("batch_size", "eval_batch_size"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
