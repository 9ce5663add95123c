"""The abstract base class of tasks, and the registry of tasks.

A task brings together a data set, a model, a loss and metrics. To add a task, write a subclass of `Task` in a file of
its own and decorate it with `@register_task`. The task is registered when its module is imported. To have a module
outside of this package imported, name it in `config.plugins`.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

from surm_jax import data
from surm_jax.errors import UserError
from surm_jax.models.base import Config, Model, model_class, model_of_variant
from surm_jax.pretrained import locate, model_config
from surm_jax.pretrained.sources import is_folder
from surm_jax.tasks.config import GEOMETRY, DataConfig, ModelConfig
from surm_jax.tasks.objective import Objective

Batch = dict[str, jax.Array]
"""A batch on the devices: arrays by name, such as "image" and "label"."""

Forward = Callable[[nnx.Module, Batch, jax.Array | None], Any]
"""A function `(model, batch, key) -> outputs`, such as logits. The key is for dropout, and None means no dropout."""


class Questions(Protocol):
    """New examples without labels. `launch.py --mode=predict` predicts their labels with a trained adapter."""

    @property
    def count(self) -> int:
        """The number of examples."""

    def batches(
        self, checkpoint: Path | None, geometry: Any, batch_size: int, lengths: tuple[int, ...]
    ) -> data.EvalBatches:
        """Return the batches of one pass over the examples.

        Each batch also has two arrays of shape (batch,): `index` holds the indices of its examples, and `mask` is False
        for rows that are padding.

        Args:
            checkpoint: The file or folder of the pretrained weights, which also holds the tokeniser of a text model.
            geometry: The configuration of the model.
            batch_size: The number of examples per batch.
            lengths: The lengths in tokens to which a batch of text can be padded, in increasing order.
        """

    def write(self, target: Path, classes: tuple[str, ...], logits: np.ndarray) -> None:
        """Write the predictions to a file, completely or not at all, and print how many there are.

        Args:
            target: The file.
            classes: The names of the classes. It is empty if the labels are real numbers.
            logits: The outputs of the model, of shape (count, outputs).

        Raises:
            UserError: The file cannot be written.
        """


class SplitInputs(NamedTuple):
    """What says which inputs the model reads for the examples of a split, so that their states can be stored.

    Attributes:
        identity: A text that differs if an example has another input. It need not contain the content of the files of
            the data set, nor anything that the model's configuration says.
        examples: The number of examples.
        offsets: For text, the number of tokens before each example, and that of all tokens, an array of shape
            (examples + 1,). For images, None.
    """

    identity: str
    examples: int
    offsets: np.ndarray | None = None


class Task(abc.ABC):
    """The data set, the model, the loss and the metrics of a training run.

    An instance holds the loaded data set and the place of the pretrained weights. A run makes it by calling the class
    methods `accepts`, `load`, `geometry` and `build` in this order. The "geometry" is the configuration of the model.

    Attributes:
        reads: The kind of input that the models of this task read, either "images" or "text".
        dataset: The data set, an object with the attributes `name` and `classes`. If it was read from files, their
            paths are in its attribute `files`, and a run notices when their content changes.
        model_config: The configuration of the model, such as its numbers of features and blocks, and its dtypes.
        checkpoint: The file or folder of the pretrained weights, or None for random weights.
    """

    reads: ClassVar[str]
    dataset: Any
    model_config: Any
    checkpoint: Path | None

    @property
    @abc.abstractmethod
    def objective(self) -> Objective:
        """The loss, and the function that turns the outputs of the model into predictions."""

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of the task's metrics (`surm_jax.tasks.scores.SCORES`), beginning with the most important."""

    @property
    @abc.abstractmethod
    def tests(self) -> tuple[str, ...]:
        """The names of the test splits."""

    @property
    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that can be evaluated: `tests`, and "holdout" if training examples are held out."""

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """The number of training examples."""

    @classmethod
    @abc.abstractmethod
    def accepts(cls, name: str) -> bool:
        """Return whether the data set with this name (`config.data.name`) belongs to this task, without reading it."""

    @classmethod
    @abc.abstractmethod
    def load(cls, config: DataConfig) -> Any:
        """Load the data set that `config.name` names.

        Raises:
            UserError: The data set is missing or damaged, or does not fit the configuration.
        """

    @classmethod
    def geometry(cls, model: ModelConfig, config: DataConfig, outputs: int) -> Any:
        """Return the configuration of the model to train.

        No file is read if `model.variant` names the model. Otherwise the checkpoint is read.

        Args:
            model: The section `config.model`.
            config: The section `config.data`.
            outputs: The number of outputs of the model's head.

        Raises:
            UserError: There is no such model, this task cannot train it, or the data cannot be given to it as `config`
                says.
        """
        geometry = find_geometry(model, cls.reads, outputs)
        if config.classes and cls.reads != "images":
            raise UserError(f"config.data.classes is for sets of images, but {config.name} is text: leave it empty")
        if config.lengths[-1] > (most := getattr(geometry, "max_tokens", config.lengths[-1])):
            raise UserError(
                f"config.data.lengths goes up to {config.lengths[-1]} tokens, but the model has positions for {most}"
            )
        return geometry

    @classmethod
    @abc.abstractmethod
    def build(cls, model: ModelConfig, config: DataConfig, dataset: Any, geometry: Any) -> "Task":
        """Find or download the pretrained weights, prepare the data, and return an instance of the task.

        Args:
            model: The section `config.model`.
            config: The section `config.data`.
            dataset: The result of `load`.
            geometry: The result of the class method `geometry`.

        Raises:
            UserError: The data set, the model and the files do not fit together.
        """

    @classmethod
    def read_questions(cls, config: DataConfig, source: Path) -> Questions:
        """Read new examples without labels from a file, for `launch.py --mode=predict`.

        Args:
            config: The section `config.data`.
            source: The file.

        Raises:
            UserError: The file cannot be read. A task that does not override this method always raises this error.
        """
        raise UserError(f"--mode=predict reads sentences, but this run is about {cls.reads} ({config.name})")

    @classmethod
    def reads_beside(cls, checkpoint: Path | None) -> dict[str, Any]:
        """Return what the task reads in addition to data and weights, so that a run can record and compare it.

        Args:
            checkpoint: The file or folder of the pretrained weights, or None for random weights.

        Returns:
            A dictionary with a name for each thing that is read, such as "tokenizer". A value is a tuple of paths, or
            another value that JSON can represent.
        """
        return {}

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes. It is empty if the labels are real numbers, as in regression."""
        return self.dataset.classes

    def make_model(self, seed: int) -> Model:
        """Build the model of this task, with random parameters drawn from a seed."""
        return make_model(self.model_config, seed)

    @staticmethod
    @abc.abstractmethod
    def forward(model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Run the model on a batch and return its logits. The key is for dropout, and None means no dropout."""

    @classmethod
    def outputs(cls, model: nnx.Module, batch: Batch, key: jax.Array | None) -> Any:
        """Run the model on a batch with labels, and return what `objective` reads: the logits, or what replaces them.

        A task overrides this method if the logits of a whole batch would take too much memory.
        """
        return cls.forward(model, batch, key)

    @abc.abstractmethod
    def train_batches(self, seed: int) -> data.TrainBatches:
        """Return an endless iterator over shuffled training batches that can save and restore its position.

        If a run has several processes, each gets only its own rows of every batch.
        """

    @abc.abstractmethod
    def eval_batches(self, split: str) -> data.EvalBatches:
        """Return the batches of one pass over a split. The split is one of `splits`, or "train".

        Each batch also has two arrays of shape (batch,): `index` holds the indices of its examples, and `mask` is False
        for rows that are padding.

        If a run has several processes, each gets only its own rows of every batch.
        """

    @abc.abstractmethod
    def train_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return all shapes that a training batch can have. A run compiles its step for each of them.

        Each key is a name to print, such as "32 pixels". Each value maps the name of every array of the batch to its
        shape and dtype, with the rows of all processes.
        """

    def inputs(self, split: str) -> SplitInputs | str:
        """Return what says which inputs the model reads for a split, which is "train" or one of `splits`.

        If this is not known, or if the inputs change from epoch to epoch, the result is a text that says so, and no
        states are stored.
        """
        return f"{type(self).__name__} does not say which inputs it reads"

    def with_states(self, states: Mapping[str, data.States]) -> "Task":
        """Return the same task with stored states in the place of the inputs. It is called if `inputs` returns no text.

        In the batches and in `train_shapes`, the states take the place of the array that `forward` passes to the model
        as its first argument. Nothing else changes, in particular not the order of the examples.

        Args:
            states: The states of the examples of each split, also of "train".
        """
        raise NotImplementedError(f"{type(self).__name__} must define with_states, because it defines inputs")

    def export_options(self) -> dict[str, Any]:
        """Return the keyword arguments that this task adds to a call of `surm_jax.pretrained.save_huggingface`."""
        return {}


_TASKS: list[type[Task]] = []
SomeTask = TypeVar("SomeTask", bound=type[Task])


def register_task(cls: SomeTask) -> SomeTask:
    """Register a task class, so that `task_for` finds it. Use this function as a decorator."""
    _TASKS.append(cls)
    return cls


def task_for(name: str) -> type[Task]:
    """Return the task class that accepts the data set with this name, of several the one that was registered last.

    Raises:
        UserError: No task accepts the data set.
    """
    for task in reversed(_TASKS):
        if task.accepts(name):
            return task
    raise UserError(f"no task accepts config.data.name={name}: is a module missing in config.plugins?")


def make_model(geometry: Config, seed: int) -> Model:
    """Build a model with random parameters.

    Args:
        geometry: The configuration of the model, which also determines its class.
        seed: The seed of the parameters.
    """
    return model_class(geometry)(geometry, rngs=nnx.Rngs(seed))


def find_geometry(config: ModelConfig, reads: str, outputs: int) -> Any:
    """Return the configuration of the model that `config.model` describes.

    It starts from the named variant, or from the checkpoint if `variant` is empty. Then the keys in `GEOMETRY`, such as
    `depth`, replace its values where they are not 0.

    Args:
        config: The section `config.model`.
        reads: The kind of input that the model must read, "images", "text" or "prompts".
        outputs: The number of outputs of the model's head. A model of prompts has no classes and ignores it.

    Raises:
        UserError: The keys do not fit together, or the checkpoint cannot be read or holds another kind of model.
    """
    if config.num_classes not in (0, outputs):
        raise UserError(f"config.model.num_classes={config.num_classes}, but the data asks for {outputs}")
    if config.variant and is_folder(config.checkpoint):
        raise UserError(
            f"config.model.checkpoint={config.checkpoint} says itself which model it holds, down to its numerics:"
            f" leave config.model.variant empty (--config.model.variant=), not {config.variant!r}"
        )
    head: dict[str, Any] = {} if reads == "prompts" else {"num_classes": outputs}
    if config.variant:
        model, found = model_of_variant(config.variant, reads), None
    else:
        checkpoint = locate(config.checkpoint)
        if checkpoint is None:
            raise UserError("config.model.variant is empty, but config.model.checkpoint=none does not describe a model")
        model, found = model_config(checkpoint, **head)
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
    return model.config_class.from_variant(config.variant, **head, **fields)
