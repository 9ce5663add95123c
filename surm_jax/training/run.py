"""A run at work: what stays the same from step to step, what changes, and how both are set up."""

import dataclasses
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from surm_jax.data import TrainBatches
from surm_jax.devices.mesh import put_base, replicated
from surm_jax.devices.processes import Agreement, meet
from surm_jax.peft import Adapter, AdapterConstant, Description, describe, fingerprint
from surm_jax.record.progress import Interruption, Stopwatch
from surm_jax.training.optimizer import Rates, groups_of, make_optimizer
from surm_jax.training.partition import Partition, partition
from surm_jax.training.setup import Job
from surm_jax.training.step import EvalStep, TrainState, init_state, make_eval_step, make_train_step

CHECKPOINTS_NAME = "checkpoints"
Evaluation = dict[str, dict[str, float]]
"""Metrics by split and name."""


class InterruptedRunError(Exception):
    """A run was interrupted and is saved. `status` is the exit status that belongs to the signal."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from step to step.

    Attributes:
        job: Configuration, seed, mesh and task.
        workdir: The folder of the run.
        stop: Says whether a signal asks the run to stop.
        model: The split model and the recipe of its adapter.
        programs: The functions that JAX compiles, and what they read beside the state.
    """

    job: Job
    workdir: Path
    stop: "Stop"
    model: "SplitModel"
    programs: "Programs"


class SplitModel(NamedTuple):
    """An adapted model in two parts.

    Attributes:
        partition: How trained and frozen arrays make the model.
        frozen: The frozen state, on the mesh.
        adapter: The recipe of what was added.
        description: What is trained, for people and for the result.
        base: The fingerprint of the frozen weights.
    """

    partition: Partition
    frozen: nnx.State
    adapter: Adapter
    description: Description
    base: dict[str, str]


class Programs(NamedTuple):
    """The functions that JAX compiles, and what they read beside the state.

    Attributes:
        train_step: See `surm_jax.training.step.make_train_step`.
        eval_step: See `surm_jax.training.step.make_eval_step`.
        rates: The learning rates step by step.
        key: The key of the run, on the mesh.
    """

    train_step: Any
    eval_step: EvalStep
    rates: Rates
    key: jax.Array


@dataclasses.dataclass
class Position:
    """What changes from step to step.

    Attributes:
        state: Trained arrays, optimiser and step. A step takes its memory: nothing else may refer to it.
        batches: The training batches that come next.
        began: When the run began, by the monotonic clock, without the pauses between interrupted starts.
        score: The first metric of the last evaluation, if it was made at this very step.
        tests: The evaluation of the test splits after the last step, if it was made while training.
        watch: Measures the rate of steps.
    """

    state: TrainState
    batches: TrainBatches
    began: float
    score: float | None = None
    tests: Evaluation | None = None
    watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)


class Stop:
    """Says whether a signal came, to any of the processes; all of them must ask equally often."""

    def __init__(self, interruption: Interruption, mesh: jax.sharding.Mesh):
        self._interruption, self._agreement, self._signal = interruption, Agreement(mesh), 0

    def asked(self) -> bool:
        """Return whether the run is asked to stop. Once true, it stays true."""
        self._signal = self._signal or self._agreement(self._interruption.signal or 0)
        return self._signal > 0

    def error(self, run: Run, step: int) -> InterruptedRunError:
        """Return the error to leave with, when this step is saved."""
        number = signal.Signals(self._signal)
        return InterruptedRunError(
            f"{number.name}: saved step {step} of {run.job.config.optim.steps} in {run.workdir / CHECKPOINTS_NAME};"
            " the same command goes on from there",
            128 + number,
        )


def set_up(job: Job, workdir: Path, interruption: Interruption, began: float) -> tuple[Run, Position]:
    """Load and adapt the model, split it, and make what a step needs.

    Args:
        job: What `prepare` returned.
        workdir: The folder of the run.
        interruption: Asks the run to save and stop.
        began: When the run began, by the monotonic clock.
    """
    config, mesh, task = job.config, job.mesh, job.task
    adapted, adapter = job.adapt(job.base_model())
    meet()
    description = describe(adapted, adapter)
    frozen = nnx.state(adapted, nnx.Not(adapter.trainable))
    # Constants of the adapter are not in checkpoints, and another version of the library may draw others.
    base = fingerprint(frozen) | fingerprint(frozen, AdapterConstant)
    parts, trained, frozen = partition(
        adapted,
        adapter,
        scan_layers=config.model.scan_layers,
        group_of=lambda path: groups_of([path], config.optim.groups)[path],
    )
    optimizer = make_optimizer(config.optim, trained)
    train_step = make_train_step(
        parts,
        task.forward,
        task.objective,
        optimizer,
        mesh,
        accumulate=config.optim.accumulate,
        label_smoothing=config.optim.label_smoothing,
    )
    eval_step = make_eval_step(parts, task.forward, task.objective, mesh)
    rates = Rates(config.optim, config.peft.method, trained)
    key = jax.device_put(jax.random.key(job.seed), replicated(mesh))
    run = Run(
        job,
        workdir,
        Stop(interruption, mesh),
        SplitModel(parts, put_base(frozen, mesh), adapter, description, base),
        Programs(train_step, eval_step, rates, key),
    )
    return run, Position(init_state(trained, optimizer, mesh), task.train_batches(job.seed), began)
