"""The training run of one seed, from its start to its result.

`train` does everything in this order: it sets up the run, restores the last checkpoint if there is one, compiles the
training step, makes the steps, and writes the result. Every step updates the parameters and logs metrics. Some steps
also evaluate the model or save a checkpoint (`config.log`). An interrupted run that is resumed gives bit for bit the
same result as an uninterrupted one.

Most functions here take two objects of `surm_jax.training.run`: a `Run` holds what stays the same during training, and
a `Position` holds what changes from step to step.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from surm_jax.devices.mesh import batch_sharding, put_batch
from surm_jax.devices.processes import meet, on_first, opened_on_first, several, tree_on_first, union
from surm_jax.errors import UserError
from surm_jax.peft import save_adapter
from surm_jax.record.checkpoints import Checkpoints, last_checkpoint
from surm_jax.record.metrics import MetricWriter, NotFiniteError, StepLog
from surm_jax.record.progress import Interruption, Progress, track
from surm_jax.record.report import make_result
from surm_jax.record.workdir import RESULT_NAME, open_workdir, read_result, require_shared, write_json
from surm_jax.training.config import RunConfig
from surm_jax.training.inputs import check_complete, record_inputs
from surm_jax.training.parsing import complete, resolved, to_dict
from surm_jax.training.run import CHECKPOINTS_NAME, Evaluation, InterruptedRunError, Position, Run, set_up
from surm_jax.training.setup import prepare
from surm_jax.training.step import TrainState, evaluate

Shape = tuple[tuple[str, tuple[int, ...]], ...]
"""The names of the arrays of a batch, each with its shape, sorted by name."""


class Records(NamedTuple):
    """The writers of metrics, progress and checkpoints that a run uses while it trains."""

    writer: MetricWriter
    progress: Progress
    checkpoints: Checkpoints


def train(config: RunConfig, seed: int, workdir: Path, interruption: Interruption) -> dict[str, Any]:
    """Start a run, resume it, or return its result if it is complete.

    Args:
        config: The whole configuration.
        seed: The seed to train with, from `config.seeds`.
        workdir: The folder of this seed's run.
        interruption: Catches the signals that tell the run to save a checkpoint and stop.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: The configuration, the data or the weights are not usable, the folder is in use or belongs to another
            run, a checkpoint is damaged, or a metric is not finite.
        InterruptedRunError: A signal told the run to stop, and a checkpoint was saved.
    """
    config = resolved(config, workdir)
    tree = to_dict(dataclasses.replace(config, seeds=(seed,)))
    with opened_on_first(open_workdir(workdir, tree, complete)):
        require_shared(workdir)
        if (done := on_first(functools.partial(_result_if_complete, workdir))) is not None:
            check_complete(workdir, config, seed)
            print(
                f"{workdir} holds a complete run: this is its result. To run again, delete it or choose another folder"
            )
            return done
        began = time.monotonic()
        job = prepare(config, seed)
        record_inputs(workdir, job, tree)
        with jax.set_mesh(job.mesh), _last_checkpoint_named(workdir):
            run, position = set_up(job, workdir, interruption, began)
            print(run.model.description, flush=True)
            checkpoints = restore(run, position)
            take_steps(run, position, checkpoints)
            tests = position.tests or evaluate_tests(run, position.state)
            model = _model_on_first(run, position.state)
        # Leave `jax.set_mesh` first: only the first process computes now, with its own copy of the model.
        return on_first(lambda: write_result(run, position, model, tests))


def _result_if_complete(workdir: Path) -> dict[str, Any] | None:
    return read_result(workdir) if (workdir / RESULT_NAME).exists() else None


@contextlib.contextmanager
def _last_checkpoint_named(workdir: Path) -> Iterator[None]:
    """If the `with` block raises a `NotFiniteError`, add the name of the last good checkpoint to its message."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}. {last_checkpoint(workdir / CHECKPOINTS_NAME)}") from None


def restore(run: Run, position: Position) -> Checkpoints:
    """Open the run's folder of checkpoints. If it holds any, set `position` to the state of the last one.

    Returns:
        The `Checkpoints` of the folder.

    Raises:
        UserError: A checkpoint is damaged, or belongs to another run or base model.
    """
    job = run.job
    config = to_dict(dataclasses.replace(job.config, seeds=(job.seed,)))
    checkpoints = Checkpoints(run.workdir / CHECKPOINTS_NAME, run.model.base, config)
    if checkpoints.latest is not None:
        restored = checkpoints.restore(run.model.partition.by_block(position.state))
        position.state = run.model.partition.by_step(restored.state)
        position.batches.set_state(restored.data)
        position.began -= restored.seconds
        position.score = restored.score
    return checkpoints


def take_steps(run: Run, position: Position, checkpoints: Checkpoints) -> None:
    """Make all remaining training steps, and log, evaluate and save as often as `config.log` says.

    Raises:
        UserError: A metric is not finite, a file cannot be written, or too many examples are unreadable.
        InterruptedRunError: A signal told the run to stop, and a checkpoint was saved.
    """
    config, start, total = run.job.config, int(position.state.step), run.job.config.optim.steps
    with MetricWriter(run.workdir, start) as writer, Progress(config.peft.method, total, start) as progress:
        records = Records(writer, progress, checkpoints)
        if start:
            progress.say(f"going on from step {start} of {total}")
            if position.score is None and _due(run, start, config.log.evaluate_every):
                # The run was interrupted after this step and before the evaluation that was due. Make it now.
                save(run, position, records, evaluate_while_training(run, position, records))
        compiled = compile_steps(run, position.state, progress) if start < total else {}
        log = StepLog(writer, progress, position.watch, config.log.metrics_every, total, _rates_of(run, position))
        for step in range(start + 1, total + 1):
            batch = put_batch(next(position.batches), run.job.mesh)
            update, rates = compiled[_shape_of(batch)], run.programs.rates.before(step)
            position.state, metrics = update(position.state, run.model.frozen, batch, run.programs.key, rates)
            log.note(step, metrics)
            evaluates = _due(run, step, config.log.evaluate_every)
            if run.stop.asked() or evaluates or _due(run, step, config.log.checkpoint_every):
                # Check the metrics of this step first, so that a diverged state is never saved.
                log.flush()
                position.watch.stop()
                score = _score(run, position, records) if evaluates else None
                save(run, position, records, score)
                if run.stop.asked():
                    raise run.stop.error(run, step)
                position.watch.start()
    position.watch.stop()


def compile_steps(run: Run, state: TrainState, progress: Progress) -> dict[Shape, Callable[..., Any]]:
    """Compile the training step once for each batch shape that occurs, and print how long each compilation took.

    Returns:
        The compiled steps, each with the shape of its batches as the key (see `_shape_of`).
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    rates, compiled = run.programs.rates.before(step=1), {}
    for name, shapes in run.job.task.train_shapes().items():
        began = time.monotonic()
        batch = {
            key: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=batch_sharding(run.job.mesh))
            for key, part in shapes.items()
        }
        lowered = run.programs.train_step.lower(abstract, run.model.frozen, batch, run.programs.key, rates)
        compiled[_shape_of(batch)] = lowered.compile()
        progress.say(f"compiled for batches of {name} in {time.monotonic() - began:.1f} s")
    meet()
    return compiled


def save(run: Run, position: Position, records: Records, score: float | None) -> None:
    """Save a checkpoint. The metrics up to this step are forced to disk first.

    Args:
        run: The run.
        position: The position to save.
        records: The objects that write the metrics and the checkpoints.
        score: The task's first metric if the model was evaluated at this step, otherwise None.

    Raises:
        UserError: The checkpoint cannot be written, or all processes together have skipped more unreadable training
            examples than `config.data.max_corrupt` allows.
    """
    most = run.job.config.data.max_corrupt
    # Each process knows only the unreadable examples that it has read itself. Join the sets of all processes.
    position.batches.corrupt = union(position.batches.corrupt, most)
    if (count := len(position.batches.corrupt)) > most:
        raise UserError(f"{count} training examples cannot be read, and config.data.max_corrupt allows {most}")
    records.writer.sync()
    state, seconds = run.model.partition.by_block(position.state), time.monotonic() - position.began
    records.checkpoints.save(state, position.batches.get_state(), seconds, score)


def _score(run: Run, position: Position, records: Records) -> float | None:
    """Evaluate the model, and return the task's first metric. Return None if a signal interrupts the evaluation."""
    try:
        return evaluate_while_training(run, position, records)
    except InterruptedRunError:
        return None
    except NotFiniteError:
        raise
    except Exception:
        # The evaluation failed, but the trained parameters are good: save them before the run ends. With several
        # processes this is not possible, because they must all take part in saving, and perhaps only this one failed.
        if not several():
            save(run, position, records, None)
        raise


def evaluate_while_training(run: Run, position: Position, records: Records) -> float:
    """Evaluate the held-out examples, or all test splits if none are held out. Log and show the metrics.

    Returns:
        The first metric of the first split. It becomes the score of the checkpoint of this step.
    """
    task, step = run.job.task, int(position.state.step)
    if "holdout" in task.splits:
        evaluations = {"holdout": _evaluate(run, position.state, "holdout")}
    else:
        evaluations = evaluate_tests(run, position.state)
    if step == run.job.config.optim.steps and tuple(evaluations) == task.tests:
        position.tests = evaluations
    shown = (*task.metrics, "loss")
    metrics = {f"{split}_{name}": values[name] for split, values in evaluations.items() for name in shown}
    records.writer.write(step, metrics)
    records.progress.show(step, metrics)
    return next(iter(metrics.values()))


def evaluate_tests(run: Run, state: TrainState) -> Evaluation:
    """Evaluate every test split, and return the metrics by split and name."""
    return {split: _evaluate(run, state, split) for split in run.job.task.tests}


def _evaluate(run: Run, state: TrainState, split: str) -> dict[str, float]:
    task, mesh = run.job.task, run.job.mesh
    batches = task.eval_batches(split)

    def until_interrupted() -> Iterator[dict[str, np.ndarray]]:
        for batch in track(batches, f"evaluate on {split}"):
            if run.stop.asked():
                raise run.stop.error(run, int(state.step))
            yield batch

    values = evaluate(run.programs.eval_step, state.trained, run.model.frozen, until_interrupted(), task.metrics, mesh)
    return {**values, "corrupt": batches.examples - values["examples"]}


def _model_on_first(run: Run, state: TrainState) -> Any:
    """Return the trained model in the first process, with its stacked blocks divided again, and None in the others.

    Collective: call it from every process.
    """
    arrays = tree_on_first((state.trained, run.model.frozen))
    return None if arrays is None else run.model.partition.model(*arrays)


def write_result(run: Run, position: Position, model: nnx.Module, tests: Evaluation) -> dict[str, Any]:
    """Write the adapter, the curves and `result.json` into the folder of a run, and return the result.

    Args:
        run: The run.
        position: The position after the last step.
        model: The trained model.
        tests: The evaluation of the test splits.
    """
    # A slow import, which would delay the first step of a run.
    from surm_jax.record.curves import draw_curves

    config, task, rate = run.job.config, run.job.task, position.watch.rate()
    adapter_bytes = save_adapter(run.workdir / "adapter", model, run.model.adapter)
    draw_curves(run.workdir, model, task.metrics[0])
    result = make_result(
        config.peft.method,
        tests,
        run.model.description,
        seed=run.job.seed,
        metrics=task.metrics,
        classes=task.classes,
        corrupt={
            "train": len(position.batches.corrupt),
            **{split: int(values["corrupt"]) for split, values in tests.items()},
        },
        steps=config.optim.steps,
        seconds=time.monotonic() - position.began,
        examples_per_second=rate and rate * config.data.batch_size,
        adapter_bytes=adapter_bytes,
    )
    write_json(run.workdir / RESULT_NAME, result)
    return result


def _due(run: Run, step: int, every: int) -> bool:
    return step == run.job.config.optim.steps or (every > 0 and step % every == 0)


def _rates_of(run: Run, position: Position) -> Callable[[int], dict[str, float]]:
    """Return a function from a step to the values that are logged in addition to its metrics.

    They are the learning rate of each parameter group and, if it is known, the number of examples per second.
    """

    def rates(step: int) -> dict[str, float]:
        values = {f"learning_rate_{group}": float(rate) for group, rate in run.programs.rates.before(step).items()}
        if rate := position.watch.rate():
            values["examples_per_second"] = rate * run.job.config.data.batch_size
        return values

    return rates


def _shape_of(batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Shape:
    """Return the names and shapes of a batch's arrays, as the key of the step that is compiled for such batches."""
    return tuple((name, part.shape) for name, part in sorted(batch.items()))
