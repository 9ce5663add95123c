"""The protocol that every task implements, and the registry of tasks.

A task brings together data, model, objective and scores. To add one, write a subclass of `Task` in a file of its own
and decorate it with `@register_task`. A task outside the package is registered when its module is imported: name the
module in `config.plugins`.
"""

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models.base import Config, Model, model_class, model_of_variant
from surm_jax.pretrained import locate, model_config
from surm_jax.tasks.config import GEOMETRY, DataConfig, ModelConfig
from surm_jax.tasks.objective import Objective

Batch = dict[str, jax.Array]
Forward = Callable[[nnx.Module, Batch, jax.Array | None], jax.Array]
"""`(model, batch, dropout key or None) -> logits`."""


class Questions(Protocol):
    """New examples without labels, whose labels a run predicts."""

    @property
    def count(self) -> int:
        """Number of examples."""

    def batches(self, checkpoint: Path | None, geometry: Any, config: DataConfig) -> data.EvalBatches:
        """Return the batches of one pass. Each has the `index` of its rows, and a `mask` that is False for padding."""

    def write(self, target: Path, classes: tuple[str, ...], logits: np.ndarray) -> None:
        """Write the predictions to a file, completely or not at all, and print their number.

        Args:
            target: The file.
            classes: Names of the classes; empty if the model predicts a number.
            logits: (count, outputs).

        Raises:
            UserError: The file cannot be written.
        """


class Task(abc.ABC):
    """What a training run needs to know about data and model.

    An instance holds loaded data and found files. The class methods are called before there is an instance.

    Attributes:
        reads: What its models read: "images" or "text".
        dataset: The data set, with `name` and `classes`.
        model_config: The model's geometry and precision.
        checkpoint: The file or folder of the pretrained weights, or None for random ones.
    """

    reads: ClassVar[str]
    dataset: Any
    model_config: Any
    checkpoint: Path | None

    @property
    @abc.abstractmethod
    def objective(self) -> Objective:
        """What the model's outputs mean."""

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names in `surm_jax.tasks.objective.SCORES`, the most important first."""

    @property
    @abc.abstractmethod
    def tests(self) -> tuple[str, ...]:
        """Names of the splits for testing."""

    @property
    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that can be evaluated: `tests`, and "holdout" if training examples are held out."""

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """Number of training examples."""

    @classmethod
    @abc.abstractmethod
    def accepts(cls, config: DataConfig) -> bool:
        """Return whether a data set belongs to this task, without reading it."""

    @classmethod
    @abc.abstractmethod
    def load(cls, config: DataConfig) -> Any:
        """Load the data set.

        Raises:
            UserError: It is missing or damaged, or does not fit the configuration.
        """

    @classmethod
    def geometry(cls, model: ModelConfig, config: DataConfig, outputs: int) -> Any:
        """Return the configuration of the model for a number of outputs. No weights are read if a variant is named.

        Raises:
            UserError: The configuration asks for a model that does not exist, or that this task cannot train.
        """
        return find_geometry(model, cls.reads, outputs)

    @classmethod
    @abc.abstractmethod
    def build(cls, model: ModelConfig, config: DataConfig, dataset: Any, geometry: Any) -> "Task":
        """Find the pretrained weights, and return the task.

        Args:
            model: The section `config.model`.
            config: The section `config.data`.
            dataset: What `load` returned.
            geometry: What `geometry` returned.

        Raises:
            UserError: Data, model and files do not fit together.
        """

    @classmethod
    def read_questions(cls, config: DataConfig, source: Path) -> Questions:
        """Read new examples to predict.

        Raises:
            UserError: The file cannot be read, or this task cannot predict from files.
        """
        raise UserError(f"--mode=predict reads sentences, but this run is about {cls.reads} ({config.name})")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if labels are numbers."""
        return self.dataset.classes

    def make_model(self, seed: int) -> Model:
        """Build the model with random parameters."""
        return make_model(self.model_config, seed)

    @staticmethod
    @abc.abstractmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Return the logits of a batch. The key is that of dropout; None means no dropout."""

    @abc.abstractmethod
    def train_batches(self, seed: int) -> data.TrainBatches:
        """Return an endless, resumable iterator of training batches, with this process's part of each."""

    @abc.abstractmethod
    def eval_batches(self, split: str) -> data.EvalBatches:
        """Return the batches of one pass over one of the `splits`, with this process's part of each."""

    @abc.abstractmethod
    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return the shapes of the arrays of every kind of training batch.

        The keys are names to print, such as "32 pixels". The shapes are those of whole batches, over all processes.
        """

    def export_options(self) -> dict[str, Any]:
        """Return additional keyword arguments for `surm_jax.pretrained.save_huggingface`."""
        return {}


_TASKS: list[type[Task]] = []
SomeTask = TypeVar("SomeTask", bound=type[Task])


def register_task(cls: SomeTask) -> SomeTask:
    """Add a task class to the registry. Use it as a decorator."""
    _TASKS.append(cls)
    return cls


def task_for(config: DataConfig) -> type[Task]:
    """Return the task class of a data set: the class registered last among those that accept it.

    Raises:
        UserError: No task accepts the data set.
    """
    for task in reversed(_TASKS):
        if task.accepts(config):
            return task
    raise UserError(f"no task accepts config.data.name={config.name}: is a module missing in config.plugins?")


def make_model(geometry: Config, seed: int) -> Model:
    """Build the model of a configuration with random parameters."""
    return model_class(geometry)(geometry, rngs=nnx.Rngs(seed))


def find_geometry(config: ModelConfig, reads: str, outputs: int) -> Any:
    """Return the configuration of the model that a run asks for.

    It starts from the named variant, or else from the checkpoint. The geometry keys of `config.model` that are not 0
    override it.

    Args:
        config: The section `config.model`.
        reads: What the examples of the task are: "images" or "text".
        outputs: Number of outputs of the head.

    Raises:
        UserError: The keys do not fit together, or the checkpoint cannot be read or holds another kind of model.
    """
    if config.num_classes not in (0, outputs):
        raise UserError(f"config.model.num_classes={config.num_classes}, but the data asks for {outputs}")
    if config.variant and (config.checkpoint.startswith("hf://") or Path(config.checkpoint).expanduser().is_dir()):
        raise UserError(
            f"config.model.checkpoint={config.checkpoint} says itself which model it holds, down to its numerics:"
            f" leave config.model.variant empty (--config.model.variant=), not {config.variant!r}"
        )
    if config.variant:
        model, found = model_of_variant(config.variant, reads), None
    else:
        checkpoint = locate(config.checkpoint)
        if checkpoint is None:
            raise UserError("config.model.variant is empty, but config.model.checkpoint=none does not describe a model")
        model, found = model_config(checkpoint, num_classes=outputs)
        if model.reads != reads:
            raise UserError(
                f"{checkpoint} holds a {model.__name__}, which reads {model.reads}, but config.data.name asks for a"
                f" model of {reads}"
            )
    fields = {name: value for name in GEOMETRY if (value := getattr(config, name))}
    known = {field.name for field in dataclasses.fields(model.config_class)}
    for name in fields.keys() - known:
        raise UserError(f"config.model.{name}={fields[name]}, but a {model.__name__}, which reads {reads}, has none")
    fields |= {name: getattr(config, name) for name in model.config_class.RUNTIME_FIELDS}
    if found is not None:
        return dataclasses.replace(found, **fields)
    return model.config_class.from_variant(config.variant, num_classes=outputs, **fields)
