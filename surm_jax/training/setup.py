"""From a configuration to a model, its data and its adapter. What can be wrong is found here, before compilation."""

import dataclasses
import functools

import jax
from flax import nnx

from surm_jax.devices.mesh import base_sharding, make_mesh
from surm_jax.peft import Adapter
from surm_jax.pretrained import load
from surm_jax.tasks.base import Task, make_task
from surm_jax.training.adaptation import adapt_model
from surm_jax.training.config import RunConfig, with_steps


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that is ready to be built.

    Attributes:
        config: the whole configuration, with the number of steps that its epochs take.
        seed: of the head, the updates, the order of the data and dropout.
        mesh: the devices.
        task: data and model.
    """

    config: RunConfig
    seed: int
    mesh: jax.sharding.Mesh
    task: Task

    def base_model(self) -> nnx.Module:
        """Loads the pretrained model, with a fresh head, onto the mesh."""
        return load(
            functools.partial(self.task.make_model, self.seed),
            self.task.checkpoint,
            sharding=lambda path, shape: base_sharding(self.mesh, shape.shape),
        )

    def adapt(self, model: nnx.Module) -> tuple[nnx.Module, Adapter]:
        """Returns the adapted model and its adapter."""
        return adapt_model(model, self.config.peft, self.seed)


def prepare(config: RunConfig, seed: int) -> Job:
    """Checks all of a configuration against data, devices, files and the model's layers.

    Raises:
        UserError: for whatever does not fit.
    """
    mesh = make_mesh(
        config.mesh.data,
        {
            "config.data.batch_size / config.optim.accumulate": config.data.batch_size // config.optim.accumulate,
            "config.data.eval_batch_size": config.data.eval_batch_size,
        },
        config.mesh.fsdp,
    )
    task = make_task(config)
    return Job(with_steps(config, task.examples), seed, mesh, task)
