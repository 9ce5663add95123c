"""The state of a run: what stays the same from step to step, what changes, and how both are set up."""

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
"""The metrics of an evaluation: a value for each split and each name."""


class InterruptedRunError(Exception):
    """The end of a run that a signal interrupted and that is saved. `status` is the exit status: 128 + signal."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from step to step.

    Attributes:
        job: Configuration, seed, mesh and task.
        workdir: The folder of the run.
        stop: Says whether a signal tells the run to stop.
        model: The split model and the recipe of its adapter.
        programs: The jitted functions, and their inputs other than state and batch.
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
        adapter: The recipe of the adapter.
        description: A summary of what is trained, to be printed and counted.
        base: The fingerprint of the frozen weights.
    """

    partition: Partition
    frozen: nnx.State
    adapter: Adapter
    description: Description
    base: dict[str, str]


class Programs(NamedTuple):
    """The jitted functions, and their inputs other than state and batch.

    Attributes:
        train_step: See `surm_jax.training.step.make_train_step`.
        eval_step: See `surm_jax.training.step.make_eval_step`.
        rates: The learning rates of every step.
        key: The random key of the run, on the mesh.
    """

    train_step: Any
    eval_step: EvalStep
    rates: Rates
    key: jax.Array


@dataclasses.dataclass
class Position:
    """What changes from step to step.

    Attributes:
        state: Trained arrays, optimiser and step. Each step donates it, so nothing else may refer to its arrays.
        batches: The iterator of training batches.
        began: A time of the monotonic clock. The time since then is how long the run has worked, over all its starts.
        score: The first metric of the evaluation at the restored step, or None if there was none.
        tests: The evaluation of the test splits after the last step, if it was made while training.
        watch: Measures the number of steps per second.
    """

    state: TrainState
    batches: TrainBatches
    began: float
    score: float | None = None
    tests: Evaluation | None = None
    watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)


class Stop:
    """A check whether any process got a signal to stop. All processes must call it equally often."""

    def __init__(self, interruption: Interruption, mesh: jax.sharding.Mesh):
        self._interruption, self._agreement, self._signal = interruption, Agreement(mesh), 0

    def asked(self) -> bool:
        """Return whether the run must stop. Once true, it stays true."""
        self._signal = self._signal or self._agreement(self._interruption.signal or 0)
        return self._signal > 0

    def error(self, run: Run, step: int) -> InterruptedRunError:
        """Return the error with which the run ends after this step was saved."""
        number = signal.Signals(self._signal)
        return InterruptedRunError(
            f"{number.name}: saved step {step} of {run.job.config.optim.steps} in {run.workdir / CHECKPOINTS_NAME};"
            " the same command goes on from there",
            128 + number,
        )


def set_up(job: Job, workdir: Path, interruption: Interruption, began: float) -> tuple[Run, Position]:
    """Load the model, adapt it, split it, and build the train step, the evaluation step and their inputs.

    Args:
        job: The result of `surm_jax.training.setup.prepare`.
        workdir: The folder of the run.
        interruption: Tells the run to save and stop.
        began: The time at which this start began, by the monotonic clock.
    """
    config, mesh, task = job.config, job.mesh, job.task
    adapted, adapter = job.adapt(job.base_model())
    meet()
    description = describe(adapted, adapter)
    frozen = nnx.state(adapted, nnx.Not(adapter.trainable))
    # Fingerprint also the constants of the adapter: checkpoints do not hold them, and another version of JAX may draw
    # different ones.
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
