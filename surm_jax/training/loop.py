"""A run from its first step to its result: train, evaluate, save, and go on after an interruption, bit for bit."""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from surm_jax.devices.mesh import batch_sharding, put_base, put_batch, replicated
from surm_jax.devices.processes import Agreement, meet, on_first, opened_on_first, several, tree_on_first, union
from surm_jax.errors import UserError
from surm_jax.peft import Adapter, AdapterConstant, describe, fingerprint, save_adapter
from surm_jax.record.checkpoints import Checkpoints, last_checkpoint
from surm_jax.record.metrics import MetricWriter, NotFiniteError, StepLog
from surm_jax.record.progress import Interruption, Progress, Stopwatch, track
from surm_jax.record.report import draw_curves, make_result
from surm_jax.record.workdir import RESULT_NAME, open_workdir, read_json, require_shared, write_json
from surm_jax.training.config import RunConfig, to_dict
from surm_jax.training.evaluate import evaluate, make_eval_step
from surm_jax.training.optimizer import Rates, groups_of, make_optimizer
from surm_jax.training.partition import partition
from surm_jax.training.setup import Job, prepare
from surm_jax.training.step import TrainState, init_state, make_train_step

CHECKPOINTS_NAME = "checkpoints"
Shape = tuple[tuple[str, tuple[int, ...]], ...]


class InterruptedRunError(Exception):
    """A run was interrupted and is saved. `status` is the exit status that belongs to the signal."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def train(config: RunConfig, seed: int, workdir: Path, interruption: Interruption) -> dict[str, Any]:
    """Makes one run, or goes on with it, or returns its result if it is complete.

    Args:
        config: the whole configuration.
        seed: which of its seeds.
        workdir: the folder of this seed's run.
        interruption: asks it to save and stop.

    Returns:
        What `result.json` holds.

    Raises:
        UserError: for bad input, a folder of another run or in use, a damaged checkpoint, or a loss that is not finite.
        InterruptedRunError: after SIGINT or SIGTERM, when a checkpoint is saved.
    """
    one_seed = dataclasses.replace(config, seeds=(seed,))
    with opened_on_first(open_workdir(workdir, one_seed)):
        require_shared(workdir)
        if (done := on_first(functools.partial(_result, workdir))) is not None:
            print(f"{workdir} is complete: this is its result. Delete it, or choose another folder, to run again")
            return done
        began = time.monotonic()
        job = prepare(config, seed)
        with jax.set_mesh(job.mesh):
            run = _Run(job, *job.adapt(job.base_model()), workdir, began, interruption)
            print(run.description, flush=True)
            try:
                state = run.train()
                tests, model = run.tests or run.evaluate_tests(state), run.model_on_first(state)
            except NotFiniteError as error:
                raise NotFiniteError(f"{error}. {last_checkpoint(workdir / CHECKPOINTS_NAME)}") from None
        # Without the mesh: the first process works alone, on a model of its own.
        return on_first(lambda: run.write(model, tests))


def _result(workdir: Path) -> dict[str, Any] | None:
    path = workdir / RESULT_NAME
    return read_json(path, "no result") if path.exists() else None


class _Run:
    """One run at work: what stays the same from step to step, and its clock."""

    def __init__(
        self, job: Job, model: nnx.Module, adapter: Adapter, workdir: Path, began: float, interruption: Interruption
    ):
        meet()
        self.job, self.config, self.adapter, self.workdir = job, job.config, adapter, workdir
        self.began, self.interruption = began, interruption
        self.description = describe(model, adapter)
        _, _, frozen = nnx.split(model, adapter.trainable, ...)
        # Another version of the library may draw the constants otherwise, and checkpoints do not hold them.
        self.base = fingerprint(frozen) | fingerprint(frozen, AdapterConstant)
        optim, task = self.config.optim, job.task
        self.partition, trained, frozen = partition(
            model,
            adapter,
            scan_layers=self.config.model.scan_layers,
            group_of=lambda path: groups_of([path], optim.groups)[path],
        )
        self.frozen = put_base(frozen, job.mesh)
        optimizer = make_optimizer(optim, trained)
        self.rates = Rates(optim, self.config.peft.method, trained)
        self.key = jax.device_put(jax.random.key(job.seed), replicated(job.mesh))
        self.initial_state = init_state(trained, optimizer, job.mesh)
        self.train_step = make_train_step(
            self.partition,
            task.forward,
            task.objective,
            optimizer,
            job.mesh,
            accumulate=optim.accumulate,
            label_smoothing=optim.label_smoothing,
        )
        self.eval_step = make_eval_step(self.partition, task.forward, task.objective, job.mesh)
        self.batches = task.train_batches(job.seed)
        self.watch = Stopwatch()
        self.tests: dict[str, dict[str, float]] | None = None
        self.agreement, self.signal = Agreement(job.mesh), 0

    def train(self) -> TrainState:
        """Makes the steps that are left, and returns the state after the last one."""
        # The first step takes over the initial state; one that was restored takes its place. It is kept by nobody else.
        config, state = self.config, self.initial_state
        del self.initial_state
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        total = config.optim.steps
        batches = self.batches
        one_seed = to_dict(dataclasses.replace(config, seeds=(self.job.seed,)))
        task = self.job.task
        classes = {str(label): name for label, name in enumerate(task.classes)}
        dataset = {"name": task.dataset.name, "examples": task.examples, "classes": classes}
        checkpoints = Checkpoints(self.workdir / CHECKPOINTS_NAME, self.base, one_seed, dataset)
        last_score = None
        if checkpoints.latest is not None:
            restored = checkpoints.restore(self.partition.by_block(state))
            state = self.partition.by_step(restored.state)
            batches.set_state(restored.data)
            self.began -= restored.seconds
            last_score = restored.score
            del restored
        start = int(state.step)

        def save(score: float | None) -> None:
            self._agree_on_corrupt()
            writer.sync()
            checkpoints.save(self.partition.by_block(state), batches.get_state(), time.monotonic() - self.began, score)

        with (
            MetricWriter(self.workdir, start) as writer,
            Progress(config.peft.method, total, start) as progress,
        ):
            if start:
                progress.say(f"going on from step {start} of {total}")
                if last_score is None and self._due(start, config.log.evaluate_every):
                    # It was interrupted between the step and its evaluation.
                    save(self._evaluate_while_training(state, writer, progress))
            steps = self._compile(shapes, progress) if start < total else {}
            log = StepLog(writer, progress, self.watch, config.log.metrics_every, total, self._rates)
            for step in range(start + 1, total + 1):
                batch = put_batch(next(batches), self.job.mesh)
                state, metrics = steps[_shape_of(batch)](state, self.frozen, batch, self.key, self.rates.before(step))
                log.note(step, metrics)
                evaluates = self._due(step, config.log.evaluate_every)
                if not (self._interrupted() or evaluates or self._due(step, config.log.checkpoint_every)):
                    continue
                # What has gone astray is never saved: look at this step's loss first.
                log.flush()
                self.watch.stop()
                score = None
                if evaluates:
                    # Save all the same if the evaluation is interrupted, or fails: the steps were good.
                    try:
                        score = self._evaluate_while_training(state, writer, progress)
                    except InterruptedRunError:
                        pass
                    except NotFiniteError:
                        raise
                    except Exception:
                        if not several():
                            save(None)
                        raise
                save(score)
                if self._interrupted():
                    raise self._interruption_at(step)
                self.watch.start()
        self.watch.stop()
        return state

    def model_on_first(self, state: TrainState) -> nnx.Module | None:
        """Returns the trained model to the first process."""
        arrays = tree_on_first((state.trained, self.frozen))
        return None if arrays is None else self.partition.model(*arrays)

    def write(self, model: nnx.Module, tests: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Writes adapter, curves and result of the trained model, and returns the result."""
        adapter_bytes = save_adapter(self.workdir / "adapter", model, self.adapter)
        draw_curves(self.workdir, model, self.job.task.metrics[0])
        rate = self.watch.rate()
        result = make_result(
            self.config.peft.method,
            tests,
            self.description,
            seed=self.job.seed,
            metrics=self.job.task.metrics,
            classes=self.job.task.classes,
            corrupt={
                "train": len(self.batches.corrupt),
                **{split: values["corrupt"] for split, values in tests.items()},
            },
            steps=self.config.optim.steps,
            seconds=time.monotonic() - self.began,
            examples_per_second=rate and rate * self.config.data.batch_size,
            adapter_bytes=adapter_bytes,
        )
        write_json(self.workdir / RESULT_NAME, result)
        return result

    def _due(self, step: int, every: int) -> bool:
        return step == self.config.optim.steps or (every > 0 and step % every == 0)

    def _compile(self, state: TrainState, progress: Progress) -> dict[Shape, Callable]:
        """Compiles the step for an abstract state and every kind of batch, and says so."""
        programs, mesh = {}, self.job.mesh
        for name, shapes in self.job.task.train_shapes().items():
            began = time.monotonic()
            batch = {
                key: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=batch_sharding(mesh))
                for key, part in shapes.items()
            }
            lowered = self.train_step.lower(state, self.frozen, batch, self.key, self.rates.before(step=1))
            programs[_shape_of(batch)] = lowered.compile()
            progress.say(f"compiled for batches of {name} in {time.monotonic() - began:.1f} s")
        meet()
        return programs

    def _rates(self, step: int) -> dict[str, float]:
        """The learning rate of each group in this step's update, and the speed."""
        rates = {f"learning_rate_{group}": float(rate) for group, rate in self.rates.before(step).items()}
        if rate := self.watch.rate():
            rates["examples_per_second"] = rate * self.config.data.batch_size
        return rates

    def _evaluate_while_training(self, state: TrainState, writer: MetricWriter, progress: Progress) -> float:
        """Evaluates on the examples held out, or else on those for testing; returns the first metric of the first."""
        if "holdout" in self.job.task.splits:
            evaluations = {"holdout": self._evaluate(state, "holdout")}
        else:
            evaluations = self.evaluate_tests(state)
            if int(state.step) == self.config.optim.steps:
                self.tests = evaluations
        shown = (*self.job.task.metrics, "loss")
        metrics = {f"{split}_{name}": values[name] for split, values in evaluations.items() for name in shown}
        writer.write(int(state.step), metrics)
        progress.show(int(state.step), metrics)
        return next(iter(metrics.values()))

    def evaluate_tests(self, state: TrainState) -> dict[str, dict[str, float]]:
        """Returns the evaluation of every split for testing."""
        return {split: self._evaluate(state, split) for split in self.job.task.tests}

    def _evaluate(self, state: TrainState, split: str) -> dict[str, float]:
        task = self.job.task
        batches = task.eval_batches(split)

        def until_interrupted() -> Iterator[dict[str, np.ndarray]]:
            for batch in track(batches, f"evaluate on {split}"):
                if self._interrupted():
                    raise self._interruption_at(int(state.step))
                yield batch

        step, mesh = self.eval_step, self.job.mesh
        values = evaluate(step, state.trained, self.frozen, until_interrupted(), task.metrics, mesh)
        return {**values, "corrupt": batches.examples - values["examples"]}

    def _agree_on_corrupt(self) -> None:
        """Tells every process of the corrupt training examples that others met."""
        most = self.config.data.max_corrupt
        self.batches.corrupt = union(self.batches.corrupt, most)
        if (count := len(self.batches.corrupt)) > most:
            raise UserError(f"{count} training examples cannot be read, and config.data.max_corrupt allows {most}")

    def _interrupted(self) -> bool:
        """Whether a signal came, to any of the processes: all ask equally often."""
        self.signal = self.signal or self.agreement(self.interruption.signal or 0)
        return self.signal > 0

    def _interruption_at(self, step: int) -> InterruptedRunError:
        number = signal.Signals(self.signal)
        return InterruptedRunError(
            f"{number.name}: saved step {step} of {self.config.optim.steps} in {self.workdir / CHECKPOINTS_NAME};"
            " the same command goes on from there",
            128 + number,
        )


def _shape_of(batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Shape:
    """What a program is compiled for."""
    return tuple((name, part.shape) for name, part in sorted(batch.items()))
