"""The task of image classification."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
from flax import nnx

from surm_jax import data
from surm_jax.devices.processes import share
from surm_jax.errors import UserError
from surm_jax.pretrained import image_normalization, locate
from surm_jax.tasks.base import Batch, Task, register_task
from surm_jax.tasks.config import DataConfig, ModelConfig
from surm_jax.tasks.objective import CLASSES, Objective


@register_task
@dataclasses.dataclass(frozen=True)
class ImageClassification(Task):
    """The task of predicting the class of an image.

    Attributes:
        config: The section `config.data`.
        dataset: The training and the test examples. The training examples do not include those held out.
        holdout: The training examples that are held out for validation, or None.
        model_config: The configuration of the model.
        checkpoint: The file or folder of the pretrained weights, or None for random weights.
        normalization: The mean and the standard deviation of each channel with which the model expects images to be
            normalised, or None if it expects pixels in [-1, 1].
    """

    config: DataConfig
    dataset: data.ImageDataset
    holdout: data.ImageSource | None
    model_config: Any
    checkpoint: Path | None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None

    reads: ClassVar = "images"

    @classmethod
    def accepts(cls, config: DataConfig) -> bool:
        """Return whether the data set holds images. This is assumed of every data set that does not hold text."""
        return not data.is_text(config.name)

    @classmethod
    def load(cls, config: DataConfig) -> data.ImageDataset:
        """Load the data set. If `config.classes` is not empty, keep only the images of these classes."""
        dataset = cast(data.ImageDataset, data.load(config.name, config.dir or None))
        return data.keep_classes(dataset, config.classes) if config.classes else dataset

    @classmethod
    def build(
        cls, model: ModelConfig, config: DataConfig, dataset: data.ImageDataset, geometry: Any
    ) -> "ImageClassification":
        """Find or download the weights, read which normalisation of images they expect, and return the task.

        Raises:
            UserError: The weights cannot be found, or the images or the normalisation have another number of channels
                than the model.
        """
        train = data.first_examples(dataset.train, config.train_examples)
        train, holdout = data.hold_out(train, config.holdout)
        dataset.require_channels(geometry.channels)
        checkpoint = locate(model.checkpoint, model.variant or None)
        if checkpoint is None:
            warnings.warn(
                f"config.model.checkpoint=none: the {model.variant} model starts from RANDOM weights, not from"
                " pretrained ones. Frozen random layers adapt badly",
                stacklevel=2,
            )
        normalization = image_normalization(checkpoint)
        if normalization and len(normalization[0]) != geometry.channels:
            raise UserError(
                f"{checkpoint} normalises images of {len(normalization[0])} channels, but the model reads"
                f" {geometry.channels}: its preprocessor_config.json must give image_mean and image_std for each"
            )
        return cls(config, dataclasses.replace(dataset, train=train), holdout, geometry, checkpoint, normalization)

    @classmethod
    def reads_beside(cls, checkpoint: Path | None) -> dict[str, Any]:
        """Return the normalisation of images."""
        normalization = image_normalization(checkpoint)
        return {"image processor": normalization and normalization._asdict()}

    @property
    def objective(self) -> Objective:
        """Cross-entropy, with one logit for each class."""
        return CLASSES

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the task's metrics (`surm_jax.tasks.objective.SCORES`)."""
        return ("accuracy",)

    @property
    def tests(self) -> tuple[str, ...]:
        """The names of the test splits."""
        return ("test",)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that can be evaluated: "test", and "holdout" if training examples are held out."""
        return self.tests if self.holdout is None else (*self.tests, "holdout")

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.dataset.train)

    @staticmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Return the logits of a batch of images. The key is for dropout, and None means no dropout."""
        return model(batch["image"], rngs=key)

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Return an endless iterator over training batches, with this process's rows of each batch."""
        return data.train_batches(
            self.dataset.train,
            **share(self.config.batch_size),
            image_size=self.model_config.image_size,
            augment=cast(data.Augment, self.config.augment),
            seed=seed,
            normalization=self.normalization,
            max_corrupt=self.config.max_corrupt,
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Return the batches of one pass over "test" or "holdout", with this process's rows of each batch."""
        source = self.holdout if split == "holdout" and self.holdout is not None else self.dataset.test
        return data.eval_batches(
            source,
            **share(self.config.eval_batch_size),
            image_size=self.model_config.image_size,
            normalization=self.normalization,
            max_corrupt=self.config.max_corrupt,
        )

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return the shapes of the arrays of a training batch.

        The dictionary has only one entry, because all batches have the same shapes.
        """
        size, side = self.config.batch_size, self.model_config.image_size
        image = jax.ShapeDtypeStruct((size, side, side, self.model_config.channels), "float32")
        return {f"{side} pixels": {"image": image, "label": jax.ShapeDtypeStruct((size,), "int32")}}

    def export_options(self) -> dict[str, Any]:
        """Return the normalisation of images, which `save_huggingface` writes into the exported folder."""
        half = (0.5,) * self.model_config.channels
        return {"normalization": self.normalization or (half, half)}
