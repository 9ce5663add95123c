"""The two objects of a training run: `Run` stays the same from step to step, and `Position` changes."""

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
from surm_jax.training.states import Frozen, with_states
from surm_jax.training.step import EvalStep, TrainState, init_state, make_eval_step, make_train_step

CHECKPOINTS_NAME = "checkpoints"
Evaluation = dict[str, dict[str, float]]
"""The metrics of an evaluation: for each split, the values of the metrics by name."""


class InterruptedRunError(Exception):
    """The exception that ends a run after a signal told it to stop and a checkpoint was saved.

    Attributes:
        status: The exit status for the process: 128 plus the number of the signal.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Run:
    """The part of a run that stays the same from step to step.

    Attributes:
        job: The configuration, the seed, the device mesh and the task.
        workdir: The folder of the run.
        stop: Says whether a signal has told any process of the run to stop.
        model: The adapted model without its trained arrays, which are in `Position.state`.
        programs: The jitted functions, the learning rates and the random key.
    """

    job: Job
    workdir: Path
    stop: "Stop"
    model: "SplitModel"
    programs: "Programs"


class SplitModel(NamedTuple):
    """An adapted model without its trained arrays.

    Attributes:
        partition: Puts trained arrays and frozen state together into the model.
        frozen: The frozen state, on the devices of the mesh.
        adapter: The rules and the name of the adapter.
        description: A printable table of what is trained, with the numbers of parameters.
        base: The fingerprint of the base model: a digest of every frozen array, by its path.
    """

    partition: Partition
    frozen: nnx.State
    adapter: Adapter
    description: Description
    base: dict[str, str]


class Programs(NamedTuple):
    """The jitted training and evaluation steps of a run, with the learning rates and the key that they need.

    Attributes:
        train_step: The result of `surm_jax.training.step.make_train_step`.
        eval_step: The result of `surm_jax.training.step.make_eval_step`.
        rates: The learning rates of every step.
        key: The random key from which every step derives its dropout masks. It is replicated on all devices of the
            mesh.
    """

    train_step: Any
    eval_step: EvalStep
    rates: Rates
    key: jax.Array


@dataclasses.dataclass
class Position:
    """The part of a run that changes from step to step.

    Attributes:
        state: The trained arrays, the state of the optimiser, and the step. The jitted training step donates it, so
            nothing else may refer to its arrays.
        batches: The iterator over training batches.
        began: The value of `time.monotonic()` when the run began, minus the working time of earlier starts. The time
            since then is the working time of the run.
        score: The task's first metric in the evaluation at the restored step, or None without such an evaluation.
        tests: The evaluation of the test splits after the last step, or None before it.
        watch: Measures the number of steps per second.
    """

    state: TrainState
    batches: TrainBatches
    began: float
    score: float | None = None
    tests: Evaluation | None = None
    watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)


class Stop:
    """Tells all processes of a run to stop as soon as one of them has got a signal.

    All processes must call `asked` equally often, because they exchange their signals in it.

    Args:
        interruption: Catches the signals that this process gets.
        mesh: The mesh of all devices of all processes.
    """

    def __init__(self, interruption: Interruption, mesh: jax.sharding.Mesh):
        self._interruption, self._agreement, self._signal = interruption, Agreement(mesh), 0

    def asked(self) -> bool:
        """Return whether the run must stop. Once the result is true, it stays true in later calls."""
        self._signal = self._signal or self._agreement(self._interruption.signal or 0)
        return self._signal > 0

    def error(self, run: Run, step: int) -> InterruptedRunError:
        """Return the exception with which the run ends after a checkpoint of this step was saved."""
        return self._error(
            f"saved step {step} of {run.job.config.optim.steps} in {run.workdir / CHECKPOINTS_NAME}; the same command"
            " goes on from there"
        )

    def check(self) -> None:
        """Raise an `InterruptedRunError` if a process has got a signal while the run computes states."""
        if self.asked():
            raise self._error("stopped while the frozen part was computed; the same command computes it again")

    def _error(self, message: str) -> InterruptedRunError:
        number = signal.Signals(self._signal)
        return InterruptedRunError(f"{number.name}: {message}", 128 + number)


def set_up(job: Job, workdir: Path, interruption: Interruption, began: float) -> tuple[Run, Position]:
    """Load and adapt the model, and build everything that a training run needs before its first step.

    Args:
        job: The result of `surm_jax.training.setup.prepare`.
        workdir: The folder of the run.
        interruption: Catches the signals that tell the run to save a checkpoint and stop.
        began: The value of `time.monotonic()` when the program started to work on this run.

    Returns:
        The run, and its position before the first step.
    """
    config, mesh, task = job.config, job.mesh, job.task
    adapted, adapter = job.adapt(job.base_model())
    meet()
    description = describe(adapted, adapter)
    frozen = nnx.state(adapted, nnx.Not(adapter.trainable))
    # Include the constants of the adapter (`AdapterConstant`) in the fingerprint. Checkpoints do not hold these random
    # arrays, and another version of JAX may draw different ones from the same key.
    base = fingerprint(frozen) | fingerprint(frozen, AdapterConstant)
    parts, trained, frozen = partition(
        adapted,
        adapter,
        scan_layers=config.model.scan_layers,
        group_of=lambda path: groups_of([path], config.optim.groups)[path],
    )
    frozen, stop = put_base(frozen, mesh), Stop(interruption, mesh)
    forward = task.outputs
    if config.data.cache == "auto":
        taken = config.optim.steps * config.data.batch_size
        task, forward = with_states(task, Frozen(parts, trained, frozen, base), mesh, taken, stop.check)
    optimizer = make_optimizer(config.optim, trained)
    train_step = make_train_step(
        parts,
        forward,
        task.objective,
        optimizer,
        mesh,
        accumulate=config.optim.accumulate,
        label_smoothing=config.optim.label_smoothing,
    )
    eval_step = make_eval_step(parts, forward, task.objective, mesh)
    rates = Rates(config.optim, config.peft.method, trained)
    key = jax.device_put(jax.random.key(job.seed), replicated(mesh))
    run = Run(
        dataclasses.replace(job, task=task),
        workdir,
        stop,
        SplitModel(parts, frozen, adapter, description, base),
        Programs(train_step, eval_step, rates, key),
    )
    return run, Position(init_state(trained, optimizer, mesh), task.train_batches(job.seed), began)
