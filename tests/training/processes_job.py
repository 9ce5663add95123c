"""The configuration of a tiny job for `launch.py` with several processes, one of which can be made to fail.

The option is `--config=tests/training/processes_job.py:FOLDER`. `tiny.write_files` or `tiny_text.write_files` has
filled the folder.

The environment variable `BEFALLS` makes one process fail. `BEFALLS=1:5:SIGKILL` sends the signal SIGKILL to process 1
when it moves its fifth batch since its start to the devices. `BEFALLS=1:5:error` raises a `UserError` there instead.
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
