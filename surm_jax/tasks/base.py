"""What a run is about: its examples, its model, and what is asked of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models import Bert, ViT
from surm_jax.tasks.glue import text_model_config, text_task
from surm_jax.tasks.image_classification import image_model_config, image_task
from surm_jax.tasks.objective import Objective
from surm_jax.training.config import RunConfig
from surm_jax.training.step import Batch


class Task(Protocol):
    """What training asks of a kind of data and its model.

    Attributes:
        dataset: the data, with its name.
        model_config: of the model: geometry and precision.
        checkpoint: the file or folder of the pretrained weights, or None for random ones.
        classes: the names of the classes; empty where labels are numbers.
        metrics: names in `surm_jax.tasks.scores.SCORES`, the most important first.
        tests: the names of the splits for testing.
        splits: what can be evaluated: `tests`, and "holdout" if training examples are held out.
        examples: number of training examples.
        objective: what the model's outputs mean.
    """

    dataset: data.ImageDataset | data.TextDataset
    model_config: Any
    checkpoint: Path | None
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    tests: tuple[str, ...]
    splits: tuple[str, ...]
    examples: int
    objective: Objective

    def make_model(self, seed: int) -> nnx.Module:
        """Builds the model with random parameters."""

    def forward(self, model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Returns the logits of a batch; the key draws dropout."""

    def train_batches(self, seed: int) -> data.TrainBatches:
        """Returns the endless, resumable batches of a run: this process's part of each."""

    def eval_batches(self, split: str) -> data.EvalBatches:
        """Returns the batches of a pass over one of `splits`: this process's part of each."""

    def export_options(self) -> dict[str, Any]:
        """Returns what `save_huggingface` is to write beside the weights."""

    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns every kind of batch that training will bring, all processes' parts together, by a name for people."""


def make_task(config: RunConfig) -> Task:
    """Loads the data and brings it together with model and files.

    Raises:
        UserError: for whatever does not fit.
    """
    dataset = _load(config)
    return text_task(config, dataset) if isinstance(dataset, data.TextDataset) else image_task(config, dataset)


def model_maker(config: RunConfig) -> Callable[[int], nnx.Module]:
    """Returns what builds the model from a seed, without data but for its number of classes.

    The data set is looked at for that alone, and not even that if `config.model.num_classes` says it.

    Raises:
        UserError: for whatever does not fit.
    """
    outputs = config.model.num_classes or max(1, len(_load(config).classes))
    if data.is_text(config.data.name):
        bert = text_model_config(config, outputs)
        return lambda seed: Bert(bert, rngs=nnx.Rngs(seed))
    vit = image_model_config(config, outputs)
    return lambda seed: ViT(vit, rngs=nnx.Rngs(seed))


def _load(config: RunConfig) -> data.ImageDataset | data.TextDataset:
    """Loads the data set, or the classes of it that are asked for."""
    dataset, classes = data.load(config.data.name, config.data.dir or None), config.data.classes
    if not classes:
        return dataset
    if isinstance(dataset, data.TextDataset):
        raise UserError(f"config.data.classes is for sets of images, but {config.data.name} is text: leave it empty")
    return data.keep_classes(dataset, classes)
