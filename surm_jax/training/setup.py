"""Turn a configuration into a `Job`, which holds the loaded data and knows how to load and adapt the model.

Errors in the configuration, the data and the files are found here, before anything is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import jax
from flax import nnx

from surm_jax.devices.mesh import base_sharding, make_mesh
from surm_jax.errors import UserError
from surm_jax.models import HEAD, Model
from surm_jax.paths import join
from surm_jax.peft import Adapter, Description, PartMethod, Rule, Selection, adapt, describe, make_method
from surm_jax.pretrained import load
from surm_jax.tasks.base import Task, make_model, task_for
from surm_jax.training.config import PeftConfig, RunConfig, with_steps


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked configuration, together with the device mesh and the task of a run.

    Attributes:
        config: The whole configuration. If `optim.epochs` is not 0, `optim.steps` has already been computed from it.
        seed: The seed of the new head's weights, the adapter's initial weights, the order of the data, and dropout.
        mesh: The device mesh.
        task: The task, which holds the loaded data set, the configuration of the model, and the path of the pretrained
            weights.
    """

    config: RunConfig
    seed: int
    mesh: jax.sharding.Mesh
    task: Task

    def base_model(self) -> Model:
        """Load the pretrained model onto the devices of the mesh, with a new head for the classes of the data set."""
        return load_base(functools.partial(self.task.make_model, self.seed), self.task.checkpoint, self.mesh)

    def adapt(self, model: Model) -> tuple[nnx.Module, Adapter]:
        """Add the adapter that the configuration describes to a model. Return the adapted model and the `Adapter`."""
        return adapt_model(model, self.config.peft, self.seed)


def prepare(config: RunConfig, seed: int) -> Job:
    """Check that a run with this configuration is possible, load the data, and return the job.

    The devices are checked first, then the data set, the layers to adapt, and the files of the pretrained weights.

    Raises:
        UserError: One of these checks fails.
    """
    mesh = make_mesh(
        config.mesh.data,
        {
            "config.data.batch_size / config.optim.accumulate": config.data.batch_size // config.optim.accumulate,
            "config.data.eval_batch_size": config.data.eval_batch_size,
        },
        config.mesh.fsdp,
    )
    kind = task_for(config.data.name)
    dataset = kind.load(config.data)
    if config.optim.label_smoothing and not dataset.classes:
        raise UserError(
            f"config.optim.label_smoothing={config.optim.label_smoothing}, but {config.data.name} has no classes, and"
            " only the labels of classes can be smoothed: set it to 0"
        )
    geometry = kind.geometry(config.model, config.data, max(1, len(dataset.classes)))
    # This checks the rules of the adapter. Do it before the next line, which may download pretrained weights.
    describe_model(config, functools.partial(make_model, geometry))
    task = kind.build(config.model, config.data, dataset, geometry)
    return Job(with_steps(config, task.examples), seed, mesh, task)


def load_base(make: Callable[[], Model], checkpoint: Path | None, mesh: jax.sharding.Mesh) -> Model:
    """Load a pretrained model onto the devices of a mesh.

    Args:
        make: A function that builds the model with random parameters.
        checkpoint: The file or folder of the pretrained weights. None keeps the random parameters.
        mesh: The device mesh.
    """
    return load(checkpoint, make, sharding=lambda path, shape: base_sharding(mesh, shape.shape))


def describe_config(config: RunConfig) -> Description:
    """Return a description of what a configuration trains, without loading weights.

    The data set is read only to count its classes, and not at all if `config.model.num_classes` gives their number.

    Raises:
        UserError: The parts of the configuration do not fit together.
    """
    kind = task_for(config.data.name)
    outputs = config.model.num_classes or max(1, len(kind.load(config.data).classes))
    geometry = kind.geometry(config.model, config.data, outputs)
    return describe_model(config, functools.partial(make_model, geometry))


def describe_model(config: RunConfig, make: Callable[[int], Model]) -> Description:
    """Return a description of what a configuration trains in a model, without loading weights or data.

    Args:
        config: The whole configuration.
        make: A function from a seed to the model. It is only traced (`nnx.eval_shape`), and no arrays are allocated.

    Raises:
        UserError: A rule or a pattern matches nothing, a rule matches a layer that cannot be adapted, nothing would be
            trained, or a trained parameter would not be float32.
    """
    model, adapter = adapt_model(nnx.eval_shape(functools.partial(make, 0)), config.peft, 0)
    for path, variable in nnx.to_flat_state(nnx.state(model, adapter.trainable)):
        if variable.dtype != "float32":
            raise UserError(
                f"{join(path)} would be trained in {variable.dtype}, which loses small steps: leave"
                " config.model.param_dtype at float32, or train only adapters"
            )
    description = describe(model, adapter)
    if not description.trainable:
        raise UserError(f"nothing would be trained: config.peft.train is empty, and {config.peft.method} adds nothing")
    return description


def adapt_model(model: Model, peft: PeftConfig, seed: int) -> tuple[nnx.Module, Adapter]:
    """Add the adapter that `config.peft` describes to a model. Return the adapted model and the `Adapter`.

    Args:
        model: The base model.
        peft: The section `config.peft`.
        seed: The seed of the adapter's initial weights.

    Raises:
        UserError: A rule or a pattern matches nothing, or a rule matches a layer that cannot be adapted.
    """
    # Fold in a constant: the random weights of the model were drawn from the key of the seed itself.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
    rules, train = rules_of(peft, model.config.new_head)
    return adapt(model, rules, train=train, execution=peft.execution, rngs=rngs)


def rules_of(peft: PeftConfig, new_head: Sequence[str]) -> tuple[list[Rule], tuple[str, ...]]:
    """Return the rules of an adapter, and patterns for the parameters of the base model that are trained themselves.

    Args:
        peft: The section `config.peft`.
        new_head: Patterns for the parameters that a new task initialises. They are trained whenever `head` is trained.
            For example, the head of RoBERTa has a second layer whose path does not begin with `head`.

    Raises:
        UserError: `peft.target` selects modules, but the method chooses its parameters by patterns of its own.
    """
    trained = [part for pattern in peft.train for part in (pattern, *(new_head if (pattern,) == HEAD else ()))]
    train = tuple(dict.fromkeys(trained))
    rules = []
    for r in peft.rules:
        # The method cannot be a `Selection`, such as `full`: `Rule` raises an error for it.
        method = cast(PartMethod, make_method(r.method, dict(r.settings))) if r.method else None
        rules.append(Rule(r.target, method, r.parts, r.which))
    chosen = peft.methods[peft.method]
    if isinstance(chosen, Selection):
        if peft.target not in ("", "none"):
            raise UserError(
                f"config.peft.target={peft.target}, but {peft.method} chooses the parameters that it trains by its own"
                " patterns: leave target empty"
            )
        return rules, (*train, *chosen.patterns)
    if peft.target != "none":
        rules.append(Rule(peft.target or chosen.target, cast(PartMethod, chosen)))
    return rules, train
