"""Data sets and the input pipeline: `load` a set, then `train_batches` and `eval_batches`."""

from surm_jax.data.dataset import ArraySource, ImageDataset, ImageSource, hold_out
from surm_jax.data.image_transforms import Augment, eval_image, train_image
from surm_jax.data.pipeline import EvalBatches, eval_batches, train_batches
from surm_jax.data.sources import load

__all__ = [
    "ArraySource",
    "Augment",
    "EvalBatches",
    "ImageDataset",
    "ImageSource",
    "eval_batches",
    "eval_image",
    "hold_out",
    "load",
    "train_batches",
    "train_image",
]
