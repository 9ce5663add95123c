"""A training run from its first step to its result. An interrupted run resumes bit for bit.

`train` reads from top to bottom: set up, restore, compile; for each step update, log, evaluate when due and save when
due; at the end write the result. `surm_jax.training.run` defines what stays the same from step to step (`Run`) and what
changes (`Position`).
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
from surm_jax.record.report import draw_curves, make_result
from surm_jax.record.workdir import RESULT_NAME, open_workdir, read_result, require_shared, write_json
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import complete, to_dict
from surm_jax.training.run import CHECKPOINTS_NAME, Evaluation, InterruptedRunError, Position, Run, set_up
from surm_jax.training.setup import prepare
from surm_jax.training.step import TrainState, evaluate

Shape = tuple[tuple[str, tuple[int, ...]], ...]
"""The name and the shape of every array of a batch."""


class Records(NamedTuple):
    """Where a run writes while it trains."""

    writer: MetricWriter
    progress: Progress
    checkpoints: Checkpoints


def train(config: RunConfig, seed: int, workdir: Path, interruption: Interruption) -> dict[str, Any]:
    """Start a run, resume it, or return its result if it is complete.

    Args:
        config: The whole configuration.
        seed: One of its seeds.
        workdir: The folder of this seed's run.
        interruption: Tells the run to save and stop.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: An input is bad, the folder is in use or belongs to another run, a checkpoint is damaged, or a loss
            is not finite.
        InterruptedRunError: A signal came, and a checkpoint was saved.
    """
    tree = to_dict(dataclasses.replace(config, seeds=(seed,)))
    with opened_on_first(open_workdir(workdir, tree, complete)):
        require_shared(workdir)
        if (done := on_first(functools.partial(_result_if_complete, workdir))) is not None:
            print(
                f"{workdir} holds a complete run: this is its result. To run again, delete it or choose another folder"
            )
            return done
        began = time.monotonic()
        job = prepare(config, seed)
        with jax.set_mesh(job.mesh), _last_checkpoint_named(workdir):
            run, position = set_up(job, workdir, interruption, began)
            print(run.model.description, flush=True)
            checkpoints = restore(run, position)
            take_steps(run, position, checkpoints)
            tests = position.tests or evaluate_tests(run, position.state)
            model = _model_on_first(run, position.state)
        # Outside the mesh, because only the first process computes here, on its own copy of the model.
        return on_first(lambda: write_result(run, position, model, tests))


def _result_if_complete(workdir: Path) -> dict[str, Any] | None:
    return read_result(workdir) if (workdir / RESULT_NAME).exists() else None


@contextlib.contextmanager
def _last_checkpoint_named(workdir: Path) -> Iterator[None]:
    """Name the last good checkpoint in the message of a run that diverged."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}. {last_checkpoint(workdir / CHECKPOINTS_NAME)}") from None


def restore(run: Run, position: Position) -> Checkpoints:
    """Open the checkpoints and set the position to the last one, if there is one. Return the checkpoints.

    Raises:
        UserError: A checkpoint is damaged, or belongs to another run, base model or data set.
    """
    job, task = run.job, run.job.task
    config = to_dict(dataclasses.replace(job.config, seeds=(job.seed,)))
    classes = {str(label): name for label, name in enumerate(task.classes)}
    dataset = {"name": task.dataset.name, "examples": task.examples, "classes": classes}
    checkpoints = Checkpoints(run.workdir / CHECKPOINTS_NAME, run.model.base, config, dataset)
    if checkpoints.latest is not None:
        restored = checkpoints.restore(run.model.partition.by_block(position.state))
        position.state = run.model.partition.by_step(restored.state)
        position.batches.set_state(restored.data)
        position.began -= restored.seconds
        position.score = restored.score
    return checkpoints


def take_steps(run: Run, position: Position, checkpoints: Checkpoints) -> None:
    """Make the remaining steps: update, log, evaluate when due, save when due."""
    config, start, total = run.job.config, int(position.state.step), run.job.config.optim.steps
    with MetricWriter(run.workdir, start) as writer, Progress(config.peft.method, total, start) as progress:
        records = Records(writer, progress, checkpoints)
        if start:
            progress.say(f"going on from step {start} of {total}")
            if position.score is None and _due(run, start, config.log.evaluate_every):
                # The run was interrupted after this step, before its evaluation.
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
                # Check this step's loss first, so that a diverged state is never saved.
                log.flush()
                position.watch.stop()
                score = _score(run, position, records) if evaluates else None
                save(run, position, records, score)
                if run.stop.asked():
                    raise run.stop.error(run, step)
                position.watch.start()
    position.watch.stop()


def compile_steps(run: Run, state: TrainState, progress: Progress) -> dict[Shape, Callable[..., Any]]:
    """Compile the step for every shape of batch, print how long it took, and return the programs by shape."""
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
    """Save a checkpoint. The metrics up to this step are forced to disk first."""
    most = run.job.config.data.max_corrupt
    # Collect the unreadable examples of all processes.
    position.batches.corrupt = union(position.batches.corrupt, most)
    if (count := len(position.batches.corrupt)) > most:
        raise UserError(f"{count} training examples cannot be read, and config.data.max_corrupt allows {most}")
    records.writer.sync()
    state, seconds = run.model.partition.by_block(position.state), time.monotonic() - position.began
    records.checkpoints.save(state, position.batches.get_state(), seconds, score)


def _score(run: Run, position: Position, records: Records) -> float | None:
    """Evaluate and return the score. If a signal interrupts the evaluation, return None: save without a score."""
    try:
        return evaluate_while_training(run, position, records)
    except InterruptedRunError:
        return None
    except NotFiniteError:
        raise
    except Exception:
        # The evaluation failed, but the steps are good: save them before the run ends. With several processes this is
        # not possible, because saving needs all of them and only this one may have failed.
        if not several():
            save(run, position, records, None)
        raise


def evaluate_while_training(run: Run, position: Position, records: Records) -> float:
    """Evaluate the held-out examples, or the test splits if there are none; return the first split's first metric."""
    task, step = run.job.task, int(position.state.step)
    if "holdout" in task.splits:
        evaluations = {"holdout": _evaluate(run, position.state, "holdout")}
    else:
        evaluations = evaluate_tests(run, position.state)
        if step == run.job.config.optim.steps:
            position.tests = evaluations
    shown = (*task.metrics, "loss")
    metrics = {f"{split}_{name}": values[name] for split, values in evaluations.items() for name in shown}
    records.writer.write(step, metrics)
    records.progress.show(step, metrics)
    return next(iter(metrics.values()))


def evaluate_tests(run: Run, state: TrainState) -> Evaluation:
    """Return the evaluation of every test split."""
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
    """Return the trained model in the first process, and None in the others."""
    arrays = tree_on_first((state.trained, run.model.frozen))
    return None if arrays is None else run.model.partition.model(*arrays)


def write_result(run: Run, position: Position, model: nnx.Module, tests: Evaluation) -> dict[str, Any]:
    """Write the adapter, the curves and the result of a run, and return the result."""
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
    """Return a function from a step to the learning rate of each group in that step, and the speed until now."""

    def rates(step: int) -> dict[str, float]:
        values = {f"learning_rate_{group}": float(rate) for group, rate in run.programs.rates.before(step).items()}
        if rate := position.watch.rate():
            values["examples_per_second"] = rate * run.job.config.data.batch_size
        return values

    return rates


def _shape_of(batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Shape:
    """Return the key of the program that was compiled for batches of this shape."""
    return tuple((name, part.shape) for name, part in sorted(batch.items()))
