"""Classifying images with a ViT: the data, the model and how it reads a batch."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from surm_jax import data
from surm_jax.devices.processes import share
from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import image_normalization, locate
from surm_jax.tasks.model_config import find_model_config
from surm_jax.tasks.objective import CLASSES, Objective
from surm_jax.training.adaptation import describe_model
from surm_jax.training.config import RunConfig
from surm_jax.training.step import Batch


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """What a run on images is about; see `surm_jax.tasks.base.Task`.

    Attributes:
        config: the whole configuration.
        dataset: training and test examples.
        holdout: training examples that are evaluated while training, or None; `dataset.train` is without them.
        model_config: the model's geometry.
        checkpoint: the file or folder of the pretrained weights, or None for random ones.
        normalization: mean and standard deviation by channel that the weights expect, or None for pixels in [-1, 1].
    """

    config: RunConfig
    dataset: data.ImageDataset
    holdout: data.ImageSource | None
    model_config: ViTConfig
    checkpoint: Path | None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None

    metrics = ("accuracy",)
    tests = ("test",)

    @property
    def splits(self) -> tuple[str, ...]:
        """What can be evaluated."""
        return self.tests if self.holdout is None else (*self.tests, "holdout")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.dataset.classes

    @property
    def objective(self) -> Objective:
        """What the model's outputs mean."""
        return CLASSES

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.dataset.train)

    def make_model(self, seed: int) -> nnx.Module:
        """Builds the model with random parameters."""
        return ViT(self.model_config, rngs=nnx.Rngs(seed))

    @staticmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Returns the logits of a batch."""
        return model(batch["image"], rngs=key)

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Returns the endless, resumable batches of a run: this process's part of each."""
        return data.train_batches(
            self.dataset.train,
            **share(self.config.data.batch_size),
            image_size=self.model_config.image_size,
            augment=self.config.data.augment,
            seed=seed,
            normalization=self.normalization,
            max_corrupt=self.config.data.max_corrupt,
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Returns the batches of a pass over "test" or "holdout": this process's part of each."""
        return data.eval_batches(
            self.holdout if split == "holdout" else self.dataset.test,
            **share(self.config.data.eval_batch_size),
            image_size=self.model_config.image_size,
            normalization=self.normalization,
            max_corrupt=self.config.data.max_corrupt,
        )

    def export_options(self) -> dict[str, Any]:
        """Returns what `save_huggingface` is to write beside the weights: how images were normalised."""
        half = (0.5,) * self.model_config.channels
        return {"normalization": self.normalization or (half, half)}

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns the one kind of batch that there is in training."""
        size, vit = self.config.data.batch_size, self.model_config
        image = jax.ShapeDtypeStruct((size, vit.image_size, vit.image_size, vit.channels), "float32")
        return {f"{vit.image_size} pixels": {"image": image, "label": jax.ShapeDtypeStruct((size,), "int32")}}


def image_task(config: RunConfig, dataset: data.ImageDataset) -> ImageTask:
    """Brings data, model and files together.

    Raises:
        UserError: for whatever does not fit.
    """
    train = data.first_examples(dataset.train, config.data.train_examples)
    train, holdout = data.hold_out(train, config.data.holdout)
    vit = image_model_config(config, len(dataset.classes))
    dataset.require_channels(vit.channels)
    # Before the weights of a named variant are downloaded.
    describe_model(config, lambda seed: ViT(vit, rngs=nnx.Rngs(seed)))
    checkpoint = locate(config.model.checkpoint, config.model.variant or None)
    if checkpoint is None:
        warnings.warn(
            f"config.model.checkpoint=none: the {config.model.variant} model starts from RANDOM weights, not from"
            " pretrained ones. Frozen random layers adapt badly",
            stacklevel=2,
        )
    normalization = image_normalization(checkpoint)
    if normalization and len(normalization[0]) != vit.channels:
        raise UserError(
            f"{checkpoint} normalises images of {len(normalization[0])} channels, but the model reads {vit.channels}:"
            " its preprocessor_config.json must say image_mean and image_std of them"
        )
    dataset = dataclasses.replace(dataset, train=train)
    return ImageTask(config, dataset, holdout, vit, checkpoint, normalization)


def image_model_config(config: RunConfig, outputs: int) -> ViTConfig:
    """Returns the configuration of the ViT with so many outputs.

    Raises:
        UserError: see `find_model_config`.
    """
    return find_model_config(config.model, ViT, ViTConfig, outputs, "images")
