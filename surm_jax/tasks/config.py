"""The sections `config.model` and `config.data` of a configuration: what every key means, and its default and unit.

`surm_jax/training/config.py` defines the other sections and the whole configuration.
"""

import dataclasses
import typing

from surm_jax.data import Augment
from surm_jax.errors import UserError, require_one_of
from surm_jax.models import REMAT, variant_names
from surm_jax.models.base import DTYPES

GEOMETRY = ("image_size", "patch_size", "width", "depth", "heads", "mlp_width")
"""The fields of `ModelConfig` that give sizes of the model. A value other than 0 replaces that of the variant or the
checkpoint."""


def check_at_least(key: str, value: float, least: float) -> None:
    """Check that the value of a key is at least `least`. Otherwise raise a `UserError`."""
    if not value >= least:
        raise UserError(f"config.{key} must be at least {least}, got {value}")


def check_fraction(key: str, value: float) -> None:
    """Check that the value of a key lies in [0, 1). Otherwise raise a `UserError`."""
    if not 0 <= value < 1:
        raise UserError(f"config.{key} must lie in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The section `config.model`: the architecture, the weights and the dtypes of the pretrained model."""

    # The name of the architecture: "Ti/16", "S/16", "B/16" or another ViT for images, "base" or another BERT for text.
    # Empty: read the architecture from the checkpoint. The checkpoint must then be "hf://owner/name" or a folder that
    # the library transformers wrote.
    variant: str = "B/16"
    # The pretrained weights:
    #   "augreg"           the official AugReg file of the variant (ViT, ImageNet-21k), downloaded once;
    #   "digits"           the small ViT that is part of this package;
    #   "hf://owner/name"  a model of the Hugging Face Hub, downloaded once;
    #   a path or a URL    a file of weights, or a folder that the library transformers wrote;
    #   "none"             random weights.
    # A text model also reads its tokeniser from the folder of the weights.
    checkpoint: str = "augreg"
    # Number of outputs of the new head. 0: one output for each class of the data set, or a single output if the labels
    # are real numbers, as in regression.
    num_classes: int = 0
    # Sizes of the model. 0: keep the value of the variant or the checkpoint. Text models have no image_size and no
    # patch_size.
    image_size: int = 0  # Height and width of the input image, in pixels.
    patch_size: int = 0  # Height and width of a patch, in pixels.
    width: int = 0  # Number of features of a token.
    depth: int = 0  # Number of transformer blocks.
    heads: int = 0  # Number of attention heads in each block.
    mlp_width: int = 0  # Number of hidden features in the MLP of each block.
    # Probability with which the base model drops an activation during training, in [0, 1). The dropout of an adapter is
    # a separate setting of its method, such as peft.lora.dropout.
    dropout: float = 0.0
    # Dtype in which activations and matrix products are computed: "float32" or "bfloat16".
    dtype: str = "float32"
    # Dtype in which the frozen weights are stored: "float32" or "bfloat16". Trained parameters are always float32.
    param_dtype: str = "float32"
    # Rematerialisation: which activations of a block are recomputed in the backward pass instead of being kept in
    # memory. More recomputation takes less memory and more time. "none": nothing, "block": all activations, "dots": all
    # except the outputs of linear layers.
    remat: str = "none"
    # Whether to compile equal neighbouring blocks only once and run them in `jax.lax.scan`. A deep model then compiles
    # as fast as a shallow one. The results are the same up to rounding.
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
    """The section `config.data`: the data set and its batches."""

    # The data set: "digits_5to9" (part of this package), a data set of TensorFlow Datasets such as "cifar10" or
    # "glue/rte", or your own images: the path of an .npz file or of a folder of image files. The docstring of
    # `surm_jax.data.load` lists all forms. For a model that continues text: a file, a folder or a pattern of JSON
    # lines, such as "chats.jsonl" (`surm_jax.data.load_lines`).
    name: str = "cifar10"
    # The folder that holds prepared data sets of TensorFlow Datasets. Empty: $TFDS_DATA_DIR if it is set, otherwise
    # ~/tensorflow_datasets.
    dir: str = ""
    # The names of the image classes to use, at least two. Their labels are 0, 1, ... in this order. Empty: all classes.
    # Example on the command line: --config.data.classes="('cat','dog')".
    classes: tuple[str, ...] = ()
    # Number of training examples to use. 0: all. Every run with the same number uses the same examples, and the
    # examples for a larger number include those for a smaller number.
    train_examples: int = 0
    # Augmentation of training images: "none", "affine" (small random rotations, shears, shifts and scalings, for digits
    # and letters on a black background), or "crop_flip" (a random crop, flipped horizontally with probability 0.5).
    augment: str = "crop_flip"
    # The lengths in tokens to which a batch of text can be padded, in increasing order. A batch is padded to the
    # smallest length that its longest text fits in. A text longer than the last length is cut off. The training step is
    # compiled once for each length that occurs. For a model that continues text, training examples are packed into rows
    # of the last length, and a row counts as one example of a batch.
    lengths: tuple[int, ...] = (16, 32, 64, 96, 128)
    # Whether what the frozen part of the model gives for an example is computed once, stored and read from there.
    #   "auto"  wherever this is possible and pays: nothing that is trained lies before some block or before the head,
    #           there is no augmentation and no dropout of the base model, no image may be unreadable (`max_corrupt`),
    #           and the run takes every training example at least once. The files are in $SURM_JAX_CACHE/states
    #           (~/.cache/surm_jax/states), are used again by other runs, and together have at most 16 GiB.
    #   "off"   never. The results are the same up to rounding.
    cache: str = "auto"
    # Number of training examples to hold out for validation. The held-out examples are evaluated during training, and
    # the test set only once, at the end. 0: hold out none, and evaluate the test set during training. JSON lines
    # without a file for tests are tested on the held-out examples.
    holdout: int = 0
    # Largest number of images or JSON lines in each split that may be unreadable. They are skipped, with a warning for
    # each, and the result holds their number. If there are more than this, the run stops with an error.
    max_corrupt: int = 0
    # Number of training examples per update, summed over all devices and all accumulated micro-batches.
    batch_size: int = 64
    # Number of examples per batch in evaluations. It affects speed and memory, but not the result.
    eval_batch_size: int = 256

    def __post_init__(self):
        require_one_of("config.data.augment", self.augment, typing.get_args(Augment))
        require_one_of("config.data.cache", self.cache, ("auto", "off"))
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
