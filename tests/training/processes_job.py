"""A tiny job for several processes: `--config=tests/training/processes_job.py:FOLDER`, with files of images or of text.

What shall befall one of the processes is in the environment: `BEFALLS=1:5:SIGKILL` sends a signal to process 1 as its
batch of step 5 (of those since it was started) is on the way to the devices; `1:5:error` lets it fail there.
"""

import os
import signal
from pathlib import Path

import jax
import ml_collections

from surm_jax.errors import UserError
from surm_jax.models import ViTConfig
from surm_jax.training import base_config, loop
from tests.training import tiny, tiny_text


def get_config(files: str) -> ml_collections.ConfigDict:
    ViTConfig.VARIANTS[tiny.NAME] = tiny.GEOMETRY
    if befalls := os.environ.get("BEFALLS"):
        process, step, what = befalls.split(":")
        befall(int(process), int(step), what)
    config, folder = base_config(), Path(files)
    is_text = (folder / "bert").exists()
    config.update_from_flattened_dict(tiny_text.flat_config(folder, "rte") if is_text else tiny.flat_config(folder))
    return config


def befall(process: int, step: int, what: str) -> None:
    put, steps = loop.put_batch, 0

    def put_batch(*arguments):
        nonlocal steps
        steps += 1
        if jax.process_index() == process and steps == step:
            if what == "error":
                raise UserError("this process alone has a problem")
            os.kill(os.getpid(), signal.Signals[what])
        return put(*arguments)

    loop.put_batch = put_batch
