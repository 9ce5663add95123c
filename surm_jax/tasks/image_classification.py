"""The task of image classification."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
from flax import nnx

from surm_jax import data
from surm_jax.devices.processes import share
from surm_jax.errors import UserError
from surm_jax.preparation import Preparation
from surm_jax.pretrained import image_preparation, locate
from surm_jax.tasks.base import Batch, SplitInputs, Task, register_task
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
        preparation: How images are resized, cropped and normalised for the model.
        states: The stored states that take the place of images, by split. It is empty if nothing is stored.
    """

    config: DataConfig
    dataset: data.ImageDataset
    holdout: data.ImageSource | None
    model_config: Any
    checkpoint: Path | None
    preparation: Preparation
    states: Mapping[str, data.States] = dataclasses.field(default_factory=dict)

    reads: ClassVar = "images"

    @classmethod
    def accepts(cls, name: str) -> bool:
        """Return whether the data set holds images, which is assumed of every data set without text."""
        return not (data.is_text(name) or data.is_lines(name))

    @classmethod
    def load(cls, config: DataConfig) -> data.ImageDataset:
        """Load the data set. If `config.classes` is not empty, keep only the images of these classes."""
        dataset = cast(data.ImageDataset, data.load(config.name, config.dir or None))
        return data.keep_classes(dataset, config.classes) if config.classes else dataset

    @classmethod
    def build(
        cls, model: ModelConfig, config: DataConfig, dataset: data.ImageDataset, geometry: Any
    ) -> "ImageClassification":
        """Find or download the weights, read how images are prepared for them, and return the task.

        If the checkpoint prepares images of another size than the model reads, the settings are changed, and a warning
        says how.

        Raises:
            UserError: The weights cannot be found, or the images or the normalisation have another number of channels
                than the model.
        """
        train = data.first_examples(dataset.train, config.train_examples)
        train, holdout = data.hold_out(train, config.holdout)
        checkpoint = locate(model.checkpoint, model.variant or None)
        if checkpoint is None:
            warnings.warn(
                f"config.model.checkpoint=none: the {model.variant} model starts from RANDOM weights, not from"
                " pretrained ones. Frozen random layers adapt badly",
                stacklevel=2,
            )
        preparation = _fitted(checkpoint, geometry)
        dataset.require_channels(geometry.channels, preparation)
        return cls(config, dataclasses.replace(dataset, train=train), holdout, geometry, checkpoint, preparation)

    @classmethod
    def reads_beside(cls, checkpoint: Path | None) -> dict[str, Any]:
        """Return how the checkpoint says that images are prepared, which a run records like its data."""
        preparation = dataclasses.asdict(image_preparation(checkpoint))
        return {"image processor": {**preparation, "normalization": preparation["normalization"]._asdict()}}

    @property
    def objective(self) -> Objective:
        """The cross-entropy, with one logit for each class."""
        return CLASSES

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the task's metrics (`surm_jax.tasks.scores.SCORES`)."""
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
        """The number of training examples."""
        return len(self.dataset.train)

    @staticmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Run the model on a batch of images and return its logits. The key is for dropout; None means no dropout."""
        return model(batch["image"], rngs=key)

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Return an endless iterator over training batches, with this process's rows of each batch."""
        return data.train_batches(
            self.dataset.train,
            **share(self.config.batch_size),
            image_size=self.model_config.image_size,
            augment=cast(data.Augment, self.config.augment),
            seed=seed,
            preparation=self.preparation,
            max_corrupt=self.config.max_corrupt,
            states=self.states.get("train"),
        )

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Return the batches of one pass over a split, with this process's rows of each batch."""
        return data.eval_batches(
            self._source(split),
            **share(self.config.eval_batch_size),
            image_size=self.model_config.image_size,
            preparation=self.preparation,
            max_corrupt=self.config.max_corrupt,
            states=self.states.get(split),
        )

    def _source(self, split: str) -> data.ImageSource:
        if split == "holdout" and self.holdout is not None:
            return self.holdout
        return self.dataset.train if split == "train" else self.dataset.test

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return the shapes of a training batch. There is one entry, because all batches have the same shapes."""
        size, side = self.config.batch_size, self.model_config.image_size
        image = jax.ShapeDtypeStruct((size, side, side, self.model_config.channels), "float32")
        if stored := self.states.get("train"):
            image = jax.ShapeDtypeStruct((size, *stored.rows.shape[1:]), stored.rows.dtype)
        return {f"{side} pixels": {"image": image, "label": jax.ShapeDtypeStruct((size,), "int32")}}

    def inputs(self, split: str) -> SplitInputs | str:
        """Return what says which images the model reads for a split, or why this is not known."""
        if self.config.augment != "none":
            return f"config.data.augment={self.config.augment} changes the images in every epoch"
        if self.config.max_corrupt:
            return f"config.data.max_corrupt={self.config.max_corrupt} lets images be replaced"
        if (identity := data.identity_of(self._source(split))) is None:
            return f"{type(self._source(split)).__name__} has no method `identity`"
        return SplitInputs(f"{identity}, {self.preparation}", len(self._source(split)))

    def with_states(self, states: Mapping[str, data.States]) -> "ImageClassification":
        """Return the same task with stored states in the place of images."""
        return dataclasses.replace(self, states=states)

    def export_options(self) -> dict[str, Any]:
        """Return how images are prepared, which an export writes into the folder of the model."""
        return {"preparation": self.preparation}


def _fitted(checkpoint: Path | None, geometry: Any) -> Preparation:
    """Read from a checkpoint how images are prepared, and change the size in these settings to that of the model.

    Raises:
        UserError: The normalisation is for another number of channels than the model reads.
    """
    preparation = image_preparation(checkpoint)
    for values in preparation.normalization:
        if isinstance(values, tuple) and len(values) != geometry.channels:
            raise UserError(
                f"{checkpoint} normalises images of {len(values)} channels, but the model reads {geometry.channels}:"
                " the settings of its image processor must give image_mean and image_std for each"
            )
    fitted = preparation.fitted(geometry.image_size)
    if preparation.output not in (None, fitted.output):
        warnings.warn(
            f"the image processor of {checkpoint} makes images of {preparation.output[0]} pixels, but the model reads"
            f" {geometry.image_size} (config.model.image_size): all sizes are multiplied, to size = {fitted.size} and"
            f" crop_size = {fitted.crop_size}",
            stacklevel=3,
        )
    return fitted
