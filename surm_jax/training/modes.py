"""What `launch.py` can do with a run: train it, evaluate its adapter, merge, export or describe it, predict with it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from surm_jax import data
from surm_jax.devices.mesh import put_base, replicated
from surm_jax.devices.processes import on_first, opened_on_first
from surm_jax.errors import UserError
from surm_jax.peft import load_adapter, load_hf_adapter, merge, save_hf_adapter
from surm_jax.pretrained import from_pretrained, huggingface_names, save_huggingface, save_model
from surm_jax.record.progress import Interruption, track
from surm_jax.record.report import combine, table
from surm_jax.record.workdir import RESULT_NAME, locations, open_workdir, read_config, read_json, write_json
from surm_jax.tasks.base import model_maker
from surm_jax.training.adaptation import describe_model
from surm_jax.training.config import RunConfig
from surm_jax.training.evaluate import evaluate, make_eval_step
from surm_jax.training.loop import train
from surm_jax.training.partition import partition
from surm_jax.training.predict import predict_text
from surm_jax.training.setup import Job, prepare


def train_run(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Trains every seed that is not complete yet, prints the table, and returns the result.

    One seed uses `workdir` itself; of several, each has a folder `seed-<seed>` in it, and `workdir/result.json`
    combines them.

    Raises:
        UserError: see `surm_jax.training.loop.train`.
    """
    with Interruption() as interruption:
        if len(config.seeds) == 1:
            result = train(config, config.seeds[0], workdir, interruption)
            print("\n" + table([result]))
        else:
            result = _train_seeds(config, workdir, interruption)
    print(f"\nresult, curves and adapter are in {workdir}")
    return result


def _train_seeds(config: RunConfig, workdir: Path, interruption: Interruption) -> dict[str, Any]:
    with opened_on_first(open_workdir(workdir, config)):
        results = {seed: train(config, seed, folder, interruption) for seed, folder in _seed_folders(config, workdir)}
        result = combine(results)
        on_first(lambda: write_json(workdir / RESULT_NAME, result))
    labelled = [{**one, "method": f"{one['method']}, seed {seed}"} for seed, one in results.items()]
    print("\n" + table([*labelled, {**result, "method": f"{result['method']}, mean"}]))
    return result


def evaluate_run(workdir: Path, overrides: Mapping[str, Any]) -> dict[int, dict[str, dict[str, float]]]:
    """Evaluates the saved adapters of a run on all test examples, prints and returns what came out by seed and split.

    Args:
        workdir: the folder of the run, whose configuration holds.
        overrides: where its data and weights are now, if not where they were.

    Raises:
        UserError: if there is no run, it is not complete, its adapter is missing, damaged or of another base, or
            something else is overridden.
    """
    config, evaluations = locations(read_config(workdir), overrides), {}
    for seed, folder in _complete_folders(config, workdir):
        job = prepare(config, seed)
        with jax.set_mesh(job.mesh):
            parts, trained, frozen = partition(
                *load_adapter(folder / "adapter", job.base_model(), execution=job.config.peft.execution),
                scan_layers=job.config.model.scan_layers,
            )
            trained, frozen = jax.device_put(trained, replicated(job.mesh)), put_base(frozen, job.mesh)
            task = job.task
            eval_step = make_eval_step(parts, task.forward, task.objective, job.mesh)
            evaluations[seed] = {
                split: evaluate(
                    eval_step,
                    trained,
                    frozen,
                    track(task.eval_batches(split), f"evaluate on {split}"),
                    task.metrics,
                    job.mesh,
                )
                for split in task.tests
            }
        numbers = "  ".join(
            f"{split}_{name} {value:.6g}"
            for split, values in evaluations[seed].items()
            for name, value in values.items()
        )
        print(f"{folder / 'adapter'}: {numbers}")
    return evaluations


def merge_run(workdir: Path, overrides: Mapping[str, Any]) -> list[Path]:
    """Writes the full model of every adapter of a run to `<folder>/merged/model.safetensors`, and returns these paths.

    Prints how far merged kernels are from the exact sums, and merged from unmerged logits on a batch of test examples.

    Args:
        workdir: the folder of the run.
        overrides: see `evaluate_run`.

    Raises:
        UserError: see `evaluate_run`.
    """
    config, paths = locations(read_config(workdir), overrides), []
    for seed, folder in _complete_folders(config, workdir):
        job = prepare(config, seed)
        with jax.set_mesh(job.mesh):
            model, _ = load_adapter(folder / "adapter", job.base_model(), execution=job.config.peft.execution)
            merged, deviation = merge(model)
            batch = _test_batch(job)
            difference = np.abs(_logits(job, merged, batch) - _logits(job, model, batch)).max()
        paths.append(folder / "merged" / "model.safetensors")
        save_model(paths[-1], merged, job.task.model_config, job.task.export_options().get("normalization"))
        print(
            f"{paths[-1]}: kernels are within {deviation:.2g} of the exact sums;"
            f" logits of {len(batch['label'])} test examples within {difference:.2g} of the unmerged model's"
        )
    return paths


def export_run(workdir: Path, overrides: Mapping[str, Any], form: str) -> list[Path]:
    """Writes every adapter of a run for the libraries of Hugging Face, and returns the folders.

    As "hf", the merged model goes to `<folder>/hf`, for `from_pretrained` of transformers; as "peft", the adapter goes
    to `<folder>/peft`, for `PeftModel.from_pretrained` on the base model there. What was written is read again; prints
    how far its logits are from the running model's on a batch of test examples.

    Args:
        workdir: the folder of the run.
        overrides: see `evaluate_run`.
        form: "hf" or "peft".

    Raises:
        UserError: see `evaluate_run`; or the model or the method has no counterpart there.
    """
    config, folders = locations(read_config(workdir), overrides), []
    for seed, folder in _complete_folders(config, workdir):
        job = prepare(config, seed)
        with jax.set_mesh(job.mesh):
            base = job.base_model()
            model, adapter = load_adapter(folder / "adapter", base, execution=job.config.peft.execution)
            folders.append(folder / form)
            if form == "hf":
                task, geometry = job.task, job.task.model_config
                plain, _ = merge(model)
                save_huggingface(folders[-1], plain, geometry, task.classes or None, **task.export_options())
                runtime = {name: getattr(geometry, name) for name in geometry.RUNTIME_FIELDS}
                exported = from_pretrained(folders[-1], **runtime)
            else:
                names = huggingface_names(job.task.model_config)
                save_hf_adapter(folders[-1], model, adapter, names, base_model=config.model.checkpoint)
                exported, _ = load_hf_adapter(folders[-1], base, names)
            batch = _test_batch(job)
            expected = _logits(job, model, batch)
            difference = np.abs(_logits(job, exported, batch) - expected).max()
        print(
            f"{folders[-1]}: logits of {len(batch['label'])} test examples within {difference:.2g} of the running"
            f" model's, which reach {np.abs(expected).max():.2g}"
        )
    return folders


def predict_run(workdir: Path, overrides: Mapping[str, Any], source: Path, target: Path) -> None:
    """Answers new sentences with the adapter of a run on text; its data set is not needed.

    Args:
        workdir: the folder of the run, of one seed.
        overrides: where its weights are now, if not where they were.
        source: a table of sentences, see `surm_jax.training.predict.read_rows`.
        target: where the labels and probabilities go.

    Raises:
        UserError: if the run has several seeds, is not complete or not of text, or a file cannot be read or written.
    """
    config = locations(read_config(workdir), overrides)
    if len(config.seeds) > 1:
        raise UserError(
            f"{workdir} holds a run for each of {len(config.seeds)} seeds: choose one, such as"
            f" --workdir={workdir / f'seed-{config.seeds[0]}'}"
        )
    if not data.is_text(config.data.name):
        raise UserError(f"--mode=predict reads sentences, but the run in {workdir} is about {config.data.name}")
    predict_text(config, workdir / "adapter", _result(workdir)["classes"], source, target)


def describe_run(config: RunConfig) -> None:
    """Prints what a configuration would train: every adapted layer and the totals.

    Needs no weights if `config.model.variant` says which model it is; where that is empty, the checkpoint says it.
    The data set is read for its number of classes alone, and not even that if `config.model.num_classes` says it.

    Raises:
        UserError: for what does not fit.
    """
    print(describe_model(config, model_maker(config)))


def _seed_folders(config: RunConfig, workdir: Path) -> Iterator[tuple[int, Path]]:
    for seed in config.seeds:
        yield seed, workdir if len(config.seeds) == 1 else workdir / f"seed-{seed}"


def _complete_folders(config: RunConfig, workdir: Path) -> list[tuple[int, Path]]:
    """Returns the folder of every seed, before anything is loaded for the first."""
    folders = list(_seed_folders(config, workdir))
    for _, folder in folders:
        _result(folder)
    return folders


def _result(folder: Path) -> dict[str, Any]:
    return read_json(
        folder / RESULT_NAME, f"the run in {folder} is not complete (the training command goes on with it)"
    )


def _test_batch(job: Job) -> dict[str, np.ndarray]:
    return next(iter(job.task.eval_batches(job.task.tests[0])))


def _logits(job: Job, model: nnx.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    graphdef, state = nnx.split(model)
    return np.asarray(
        jax.jit(lambda state, batch: job.task.forward(nnx.merge(graphdef, state), batch, None))(state, batch)
    )
