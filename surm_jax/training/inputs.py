"""List the files and settings that a run reads, and compare them with what the run read at its first start.

A run must not go on with other data. So its first start records what it reads (`surm_jax.record.inputs`).
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surm_jax.devices.processes import on_first
from surm_jax.pretrained.sources import weight_files
from surm_jax.record.inputs import (
    PLUGIN,
    WEIGHTS,
    Inputs,
    check_inputs,
    check_recorded_files,
    describe_files,
    keep_inputs,
    read_inputs,
)
from surm_jax.record.workdir import save_config
from surm_jax.tasks.base import Task
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import saved_config, to_dict
from surm_jax.training.setup import Job, prepare


def inputs_of(job: Job) -> Inputs:
    """Return everything that a run reads, in the form that `surm_jax.record.inputs` records."""
    task = job.task
    files = tuple(getattr(task.dataset, "files", ()))
    # A data set that is not read from files is part of a package or made by a plugin.
    described = describe_files(files) if files else {"name": task.dataset.name, "examples": task.examples}
    return {
        "label names": {str(label): name for label, name in enumerate(task.classes)},
        "data": described,
        **inputs_without_data(job.config, type(task), task.model_config, task.checkpoint),
        WEIGHTS: describe_files(files) if (files := weight_files(task.checkpoint)) else None,
    }


def inputs_without_data(config: RunConfig, kind: type[Task], geometry: Any, checkpoint: Path | None) -> Inputs:
    """Return what a run reads in addition to data and weights: plugins, the model's settings, and the tokenizer.

    Args:
        config: The configuration of the run.
        kind: The class of the task.
        geometry: The configuration of the model.
        checkpoint: The file or folder of the pretrained weights.
    """
    plugins = {name: getattr(sys.modules[name], "__file__", None) for name in config.plugins}
    fields = dataclasses.asdict(geometry)
    return {
        "model": {name: value for name, value in fields.items() if name not in geometry.RUNTIME_FIELDS},
        **{
            name: describe_files(value) if isinstance(value, tuple) else value
            for name, value in kind.reads_beside(checkpoint).items()
        },
        **{f"{PLUGIN}{name}": describe_files([Path(file)]) for name, file in plugins.items() if file},
    }


def require_same_inputs(workdir: Path, job: Job) -> None:
    """Check that a job would read the same as the run in a folder has read.

    Raises:
        UserError: Something differs, or the run has no record.
    """
    check_inputs(workdir, read_inputs(workdir), inputs_of(job))


def record_inputs(workdir: Path, job: Job, tree: Mapping[str, Any]) -> None:
    """Compare what a run reads with its record, then write the record and the configuration.

    Every process compares what it reads itself with the record of the first process.

    Args:
        workdir: The folder of the run.
        job: The checked configuration, with the loaded data.
        tree: The configuration of the run, as nested dictionaries.

    Raises:
        UserError: The run has read something else.
    """
    inputs = inputs_of(job)
    check_inputs(workdir, on_first(lambda: keep_inputs(workdir, inputs)), inputs)
    on_first(lambda: save_config(workdir, tree))


def check_complete(workdir: Path, config: RunConfig, seed: int) -> None:
    """Check that a complete run has read the data and weights that a configuration names now.

    Only the content of the files is compared if the configuration names the same data set and folder as the run.
    Otherwise the data is loaded, and the new places are recorded.

    Raises:
        UserError: The run has read something else.
    """
    saved = saved_config(workdir)
    if (saved.data.name, saved.data.dir) == (config.data.name, config.data.dir):
        check_recorded_files(workdir)
    else:
        record_inputs(workdir, prepare(config, seed), to_dict(dataclasses.replace(config, seeds=(seed,))))
