"""Measure the steps of a run that stores what the frozen part of its model gives, beside those of one that does not.

    python -m benchmarks.cache --checkpoint=FOLDER --data=FOLDER_OF_PREPARED_TFDS_SETS [--set=cifar10] [--batch=64]
        [--image_size=98] [--examples=128] [--rounds=3] [--out=FILE.json]

Both runs train a linear probe, and are set up as every run is (`config.data.cache`). A step takes its batch from the
input pipeline, moves it to the devices and updates the head. `set_up_s` is the time before the first step, with the
pass that computes the states. The run `auto again` finds them.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.timing import benchmark, device, medians, setting, table, write
from surm_jax import data
from surm_jax.devices.mesh import put_batch
from surm_jax.record.progress import Interruption
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, parse
from surm_jax.training.run import set_up
from surm_jax.training.setup import Job, prepare

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The folder of the model.", required=True)
DATA = flags.DEFINE_string("data", None, "The folder of prepared data sets.", required=True)
SET = flags.DEFINE_string("set", "cifar10", "The data set.")
BATCH = flags.DEFINE_integer("batch", 64, "Examples in a batch.", lower_bound=1)
SIZE = flags.DEFINE_integer("image_size", 98, "Height and width of the images.", lower_bound=1)
EXAMPLES = flags.DEFINE_integer("examples", 128, "Training examples. A quarter as many are for testing.", lower_bound=4)
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each step is timed.", lower_bound=1)
COLUMNS = {"cache": "", "ms": ".2f", "faster": ".0f", "examples_per_s": ",.0f", "set_up_s": ".1f"}


def write_images(path: Path) -> None:
    """Write the first images of the data set, which must have one size, to an .npz file."""
    dataset = data.load(SET.value, DATA.value)
    arrays = {}
    for split, source, count in (("train", dataset.train, EXAMPLES.value), ("test", dataset.test, EXAMPLES.value // 4)):
        examples = [source[index] for index in range(count)]
        arrays[f"{split}_images"] = np.stack([example["image"] for example in examples])
        arrays[f"{split}_labels"] = np.array([example["label"] for example in examples])
    np.savez(path, **arrays)


def config(path: Path, cache: str) -> RunConfig:
    """Return the configuration of the run on an .npz file, with a value of `config.data.cache`."""
    values = base_config()
    values.update_from_flattened_dict(
        {
            "model.variant": "",
            "model.checkpoint": CHECKPOINT.value,
            "model.image_size": SIZE.value,
            "data.name": str(path),
            "data.augment": "none",
            "data.batch_size": BATCH.value,
            "data.cache": cache,
            "optim.epochs": 100.0,
            "peft.method": "linear_probe",
            "mesh.data": 1,
        }
    )
    return parse(values)


def step_of(job: Job, folder: Path) -> tuple[Callable[[], Any], float]:
    """Set up a run, and return a function that makes its next step, and the seconds that setting up took."""
    began = time.perf_counter()
    with Interruption() as interruption:
        run, position = set_up(job, folder, interruption, began)
    jax.block_until_ready(position.state)
    seconds = time.perf_counter() - began
    rates = run.programs.rates.before(1)

    def step() -> Any:
        batch = put_batch(next(position.batches), job.mesh)
        position.state, metrics = run.programs.train_step(
            position.state, run.model.frozen, batch, run.programs.key, rates
        )
        return metrics

    step()  # Compile.
    return step, seconds


def main() -> None:
    """Time the steps of both runs in turns, print a table, and write its rows to the file of `--out`."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SURM_JAX_CACHE"] = folder
        steps, seconds = {}, {}
        write_images(path := Path(folder, "images.npz"))
        jobs = {name: prepare(config(path, name.split()[0]), 0) for name in ("off", "auto", "auto again")}
        with jax.set_mesh(jobs["off"].mesh):
            for name, job in jobs.items():
                steps[name], seconds[name] = step_of(job, Path(folder))
            times = medians(steps, ROUNDS.value)
    rows = [
        {"cache": name, "ms": 1e3 * took, "faster": times["off"] / took, "examples_per_s": BATCH.value / took}
        | {"set_up_s": seconds[name], "batch": BATCH.value, "image_size": SIZE.value, "examples": EXAMPLES.value}
        | setting()
        for name, took in times.items()
    ]
    print(f"linear probe, batch {BATCH.value}, {SIZE.value} pixels, on {device()}, jax {jax.__version__}")
    print(table(rows, COLUMNS))
    write(rows)


if __name__ == "__main__":
    benchmark(main)
