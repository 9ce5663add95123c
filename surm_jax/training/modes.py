"""The modes of `launch.py`, one function each: train, evaluate, merge, export and describe.

`surm_jax.training.answers` has the modes predict and generate, which read new examples.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from surm_jax.atomic import replacing
from surm_jax.devices.mesh import put_base, replicated
from surm_jax.devices.processes import on_first, opened_on_first
from surm_jax.errors import UserError
from surm_jax.models import Model
from surm_jax.peft import Adapter, LoRA, convert, load_adapter, load_peft, merge, save_peft
from surm_jax.pretrained import from_pretrained, huggingface_names, save_huggingface, save_model
from surm_jax.pretrained.sources import published_name
from surm_jax.record.progress import Interruption, track
from surm_jax.record.report import combine, table
from surm_jax.record.workdir import RESULT_NAME, open_workdir, read_result, save_config, write_json
from surm_jax.tasks.base import Forward
from surm_jax.training.config import RunConfig
from surm_jax.training.inputs import require_same_inputs
from surm_jax.training.loop import train
from surm_jax.training.parsing import complete, resolved, saved_config, to_dict
from surm_jax.training.partition import partition
from surm_jax.training.setup import Job, describe_config, prepare
from surm_jax.training.step import evaluate, make_eval_step

ADAPTER_NAME = "adapter"
MOST_ERROR = 0.5
"""The largest relative error of a layer's update with which `export_run` converts an adapter without `force`."""


def train_run(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Train the model with every seed whose run is not complete yet. Print a table of results, and return the result.

    A single seed uses `workdir` itself. Each of several seeds uses the folder `workdir/seed-<seed>`, and
    `workdir/result.json` combines their results.

    Raises:
        UserError: See `surm_jax.training.loop.train`.
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
    config = resolved(config, workdir)
    with opened_on_first(open_workdir(workdir, to_dict(config), complete)):
        results = {seed: train(config, seed, folder, interruption) for seed, folder in _seed_folders(config, workdir)}
        result = combine(results)
        on_first(lambda: save_config(workdir, to_dict(config)))
        on_first(lambda: write_json(workdir / RESULT_NAME, result))
    labelled = [{**one, "method": f"{one['method']}, seed {seed}"} for seed, one in results.items()]
    print("\n" + table([*labelled, {**result, "method": f"{result['method']}, mean"}]))
    return result


def evaluate_run(workdir: Path, overrides: Mapping[str, Any]) -> dict[int, dict[str, dict[str, float]]]:
    """Evaluate the saved adapter of every seed of a run on all test examples, and print the metrics.

    Args:
        workdir: The folder of the run, which holds its configuration.
        overrides: New values of configuration keys, such as `data.dir` if the data was moved after training. Only the
            keys in `surm_jax.record.workdir.CHANGEABLE` may change.

    Returns:
        Nested dictionaries, in which `result[seed][split][name]` is the value of a metric.

    Raises:
        UserError: There is no run or it is not complete, an adapter is missing or damaged or was trained on another
            base model, or `overrides` changes a key that must not change.
    """
    config, evaluations = saved_config(workdir, overrides), {}
    for seed, folder in _complete_folders(config, workdir):
        job = _prepared(config, seed, folder)
        task, mesh = job.task, job.mesh
        with jax.set_mesh(mesh):
            parts, trained, frozen = partition(*_load_adapted(job, folder)[1:], scan_layers=config.model.scan_layers)
            trained, frozen = jax.device_put(trained, replicated(mesh)), put_base(frozen, mesh)
            step = make_eval_step(parts, task.outputs, task.objective, mesh)
            evaluations[seed] = {
                split: evaluate(
                    step, trained, frozen, track(task.eval_batches(split), f"evaluate on {split}"), task.metrics, mesh
                )
                for split in task.tests
            }
        numbers = "  ".join(
            f"{split}_{name} {value:.6g}"
            for split, values in evaluations[seed].items()
            for name, value in values.items()
        )
        print(f"{folder / ADAPTER_NAME}: {numbers}  ({task.dataset.name})")
    return evaluations


def merge_run(workdir: Path, overrides: Mapping[str, Any]) -> list[Path]:
    """Merge the adapter of every seed of a run into the weights of the base model, and write the merged models.

    For each seed, two differences are printed: the largest rounding error of the merged kernels, and the largest
    difference between the logits of the merged and the adapted model on one batch of test examples.

    Args:
        workdir: The folder of the run.
        overrides: See `evaluate_run`.

    Returns:
        The written files, `<folder of the seed>/merged/model.safetensors`. The files of a tokenizer are copied beside.

    Raises:
        UserError: See `evaluate_run`.
    """
    config, paths = saved_config(workdir, overrides), []
    for seed, folder in _complete_folders(config, workdir):
        job = _prepared(config, seed, folder)
        with jax.set_mesh(job.mesh):
            _, model, _ = _load_adapted(job, folder)
            merged, deviation = _merged(model)
            batch = _test_batch(job)
            difference = np.abs(_logits(job, merged, batch) - _logits(job, model, batch)).max()
        paths.append(folder / "merged" / "model.safetensors")
        options = job.task.export_options()
        save_model(paths[-1], merged, preparation=options.get("preparation"))
        for file in options.get("files", ()):
            with replacing(paths[-1].with_name(file.name)) as copy:
                shutil.copyfile(file, copy)
        print(
            f"{paths[-1]}: kernels are within {deviation:.2g} of the exact sums;"
            f" logits of {len(batch['label'])} test examples within {difference:.2g} of the unmerged model's"
        )
    return paths


def export_run(
    workdir: Path, overrides: Mapping[str, Any], form: str, *, rank: int | None = None, force: bool = False
) -> list[Path]:
    """Export the trained model or adapter of every seed in the format of a Hugging Face library.

    With the form "hf", the library transformers can load the merged model from `<folder of the seed>/hf`. With the form
    "peft", the library peft can load the adapter from `<folder of the seed>/peft` onto the base model. Each folder is
    loaded again with surm_jax, and the largest difference between its logits and those of the adapted model, on one
    batch of test examples, is printed.

    Args:
        workdir: The folder of the run.
        overrides: See `evaluate_run`.
        form: "hf" or "peft".
        rank: With the form "peft", convert every update to LoRA of this rank, the nearest one by a singular value
            decomposition. The relative errors of the updates and of the logits are printed. None: convert nothing.
        force: Whether to write a converted adapter of which an update has a relative error above `MOST_ERROR`.

    Returns:
        The written folders.

    Raises:
        UserError: See `evaluate_run`. It is also raised if the library transformers has no such model, the library
            peft has no such method, a converted update has too large an error, or `rank` is below 1, is larger than a
            layer, or is given with the form "hf".
    """
    if rank is not None and (rank < 1 or form != "peft"):
        raise UserError(f"--rank={rank} must be at least 1 and goes with --format=peft, not with --format={form}")
    if force and rank is None:
        raise UserError("--force goes with --format=peft --rank=16: nothing else has an error to accept")
    config, folders = saved_config(workdir, overrides), []
    for seed, folder in _complete_folders(config, workdir):
        job = _prepared(config, seed, folder)
        with jax.set_mesh(job.mesh):
            base, model, adapter = _load_adapted(job, folder)
            folders.append(folder / form)
            if form == "hf":
                task, geometry = job.task, job.task.model_config
                plain, _ = _merged(model)
                save_huggingface(folders[-1], plain, labels=task.classes or None, **task.export_options())
                runtime = {name: getattr(geometry, name) for name in geometry.RUNTIME_FIELDS}
                exported = from_pretrained(folders[-1], **runtime)
            else:
                written = _as_lora(model, adapter, rank, force) if rank else (model, adapter)
                names = huggingface_names(job.task.model_config)
                save_peft(folders[-1], *written, names, base_model=published_name(config.model.checkpoint))
                exported, _ = load_peft(folders[-1], base, names)
            batch = _test_batch(job)
            expected, found = _logits(job, model, batch), _logits(job, exported, batch)
        print(
            f"{folders[-1]}: logits of {len(batch['label'])} test examples within {np.abs(found - expected).max():.2g}"
            f" of the running model's, which reach {np.abs(expected).max():.2g}"
        )
        if rank:
            change = np.linalg.norm(expected - _logits(job, base, batch))
            error = np.linalg.norm(found - expected) / max(change, np.finfo(np.float32).tiny)
            print(f"what the adapter changes in these logits has a relative error of {error:.2g}")
    return folders


def _as_lora(model: nnx.Module, adapter: Adapter, rank: int, force: bool) -> tuple[nnx.Module, Adapter]:
    """Convert an adapter to LoRA, print the relative errors of its updates, and return the model and the new adapter.

    Raises:
        UserError: An update cannot be converted, or its relative error is above `MOST_ERROR` and `force` is false.
    """
    model, converted, errors = convert(model, adapter, LoRA(rank=rank, alpha=rank))
    worst = max(errors, key=lambda path: errors[path])
    said = f"as LoRA of rank {rank}, the updates have relative errors of up to {errors[worst]:.2g} (in {worst})"
    if errors[worst] > MOST_ERROR and not force:
        raise UserError(
            f"{said}, and more than {MOST_ERROR} is refused: give a larger --rank, export the merged model"
            " (--format=hf), or accept the error with --force"
        )
    print(f"{said}, and of {np.mean([*errors.values()]):.2g} in the mean over {len(errors)} layers")
    return model, converted


def describe_run(config: RunConfig) -> None:
    """Print what a configuration would train: every adapted layer, and the total numbers of parameters.

    If `config.model.variant` names the model, no weights are needed. Otherwise, the configuration of the model is read
    from the checkpoint. The data set is read only to count its classes, and not at all if `config.model.num_classes`
    gives their number.

    Raises:
        UserError: The parts of the configuration do not fit together.
    """
    print(describe_config(config))


def _seed_folders(config: RunConfig, workdir: Path) -> Iterator[tuple[int, Path]]:
    for seed in config.seeds:
        yield seed, workdir if len(config.seeds) == 1 else workdir / f"seed-{seed}"


def _complete_folders(config: RunConfig, workdir: Path) -> list[tuple[int, Path]]:
    """Return every seed with the folder of its run.

    Raises:
        UserError: The run of a seed is not complete.
    """
    folders = list(_seed_folders(config, workdir))
    for _, folder in folders:
        read_result(folder)
    return folders


def _prepared(config: RunConfig, seed: int, folder: Path) -> Job:
    """Load the data for a complete run, and check that it and the weights are still what the run has read.

    Raises:
        UserError: Something differs, or cannot be read.
    """
    job = prepare(config, seed)
    require_same_inputs(folder, job)
    return job


def _load_adapted(job: Job, folder: Path) -> tuple[nnx.Module, nnx.Module, Adapter]:
    """Load the saved adapter of a run. Return the base model, the adapted model, and the `Adapter`."""
    base = job.base_model()
    return base, *load_adapter(folder / ADAPTER_NAME, base, execution=job.config.peft.execution)


def _merged(model: nnx.Module) -> tuple[Model, float]:
    """Merge the adapter of a model into its kernels.

    Returns:
        The model without adapters, and the largest rounding error of its kernels.
    """
    plain, deviation = merge(model)
    return cast(Model, plain), deviation


def _test_batch(job: Job) -> dict[str, np.ndarray]:
    return next(iter(job.task.eval_batches(job.task.tests[0])))


def _logits(job: Job, model: nnx.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    state, forward = jitted(model, job.task.forward)
    return np.asarray(forward(state, batch))


def jitted(model: nnx.Module, forward: Forward) -> tuple[nnx.State, Any]:
    """Split a model into its state and a jitted function `(state, batch) -> logits` without dropout."""
    graphdef, state = nnx.split(model)
    return state, jax.jit(lambda state, batch: forward(nnx.merge(graphdef, state), batch, None))
