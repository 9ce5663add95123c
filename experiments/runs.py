"""Read training runs of `launch.py` for analysis: configurations, models, and the first gradient of training."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jaxtyping import Array, Float

from experiments.command import load_job
from experiments.updates import kernels
from surm_jax.devices.mesh import put_batch
from surm_jax.errors import UserError
from surm_jax.peft import Adapter, load_adapter
from surm_jax.record.workdir import read_result, relocated
from surm_jax.training import parse
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import saved_config, to_dict
from surm_jax.training.partition import partition
from surm_jax.training.setup import Job, prepare

# The Frobenius norm of the step by which `first_gradient` moves the kernel of a head if this kernel is zero.
HEAD_STEP = 1e-3


class Run(NamedTuple):
    """A finished run with its models.

    Attributes:
        job: The configuration, devices and data of the run.
        base: The pretrained model, without an adapter.
        tuned: The model after fine-tuning.
    """

    job: Job
    base: nnx.Module
    tuned: nnx.Module


def read_run(workdir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a finished run, which must have a single seed.

    Args:
        workdir: The folder of the run.
        overrides: New values of configuration keys such as `data.dir`, as in `saved_config`.

    Raises:
        UserError: The run does not exist, is not complete, or has several seeds.
    """
    config = saved_config(workdir, overrides)
    if len(config.seeds) > 1:
        raise UserError(
            f"{workdir} holds a run for each of {len(config.seeds)} seeds: choose one, such as"
            f" {workdir / f'seed-{config.seeds[0]}'}"
        )
    read_result(workdir)
    return config


def read_full(workdir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a finished run of full fine-tuning, which trained all parameters.

    Args:
        workdir: The folder of the run.
        overrides: New values of configuration keys such as `data.dir`, as in `saved_config`.

    Raises:
        UserError: As in `read_run`, or the run used another method.
    """
    config = read_run(workdir, overrides)
    if config.peft.method != "full":
        raise UserError(
            f"{workdir} holds a run of {config.peft.method}, but a fully tuned network is needed: make one with"
            " --config.peft.method=full, and name it with --full"
        )
    return config


def read_any(where: str, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a finished or unfinished run, or the configuration that a file defines.

    Args:
        where: The folder of a run, or a file such as `configs/digits.py`.
        overrides: New values of configuration keys such as `data.dir`, as in `saved_config`.

    Raises:
        UserError: There is no such run or file.
    """
    if where.partition(":")[0].endswith(".py"):
        return parse(relocated(to_dict(parse(load_job(where))), overrides))
    return saved_config(Path(where), overrides)


def open_run(config: RunConfig, workdir: Path) -> Run:
    """Load the pretrained and the fine-tuned model of a finished run. Their arrays are on the job's mesh of devices."""
    job = prepare(config, config.seeds[0])
    with jax.set_mesh(job.mesh):
        base = job.base_model()
        tuned, _ = load_adapter(workdir / "adapter", base, execution=job.config.peft.execution)
    return Run(job, base, tuned)


def first_gradient(job: Job, count: int) -> dict[str, Float[np.ndarray, "in out"]]:
    """Return the gradient of the training loss at the pretrained weights, for all kernels except that of the head.

    A gradient shows which update full fine-tuning would begin with. If the kernel of the head is zero, like that of a
    new ViT head, the gradient for all other layers is zero. In that case the head first takes one small step along its
    own negative gradient.

    Args:
        job: The job whose model and training batches are used. Dropout is off.
        count: The number of batches to average the gradient over.

    Returns:
        The gradient by the path of the layer, as a matrix (in_features, out_features).
    """
    batches = list(itertools.islice(job.task.train_batches(job.seed), count))
    with jax.set_mesh(job.mesh):
        model = job.base_model()
        head = model.head.kernel
        if not np.any(head[...]):
            (step,) = _mean_gradient(job, model, "head/kernel", batches).values()
            head[...] = -HEAD_STEP * step / jnp.linalg.norm(step)
        gradients = _mean_gradient(job, model, "(?!head/).*/kernel", batches)
    return {path: np.asarray(gradients[f"{path}/kernel"]).reshape(one.shape) for path, one in kernels(model).items()}


def _mean_gradient(
    job: Job, model: nnx.Module, pattern: str, batches: Sequence[dict[str, np.ndarray]]
) -> dict[str, Array]:
    parts, trained, frozen = partition(model, Adapter((), (pattern,)))
    task = job.task

    @jax.jit
    @jax.grad
    def gradient(trained: dict[str, Array], frozen: nnx.State, batch: dict[str, Array]) -> Float[Array, ""]:
        outputs = task.forward(parts.merge(trained, frozen), batch, None)
        return task.objective.loss(outputs, batch["label"], 0.0).mean()

    total = None
    for batch in tqdm.tqdm(batches, desc=f"gradient, {pattern}", unit="batch"):
        new = gradient(trained, frozen, put_batch(batch, job.mesh))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return {path: array.astype(jnp.float32) / len(batches) for path, array in total.items()}
