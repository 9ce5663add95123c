"""The configuration of the tiny job, for tests that start `launch.py` in a process of its own.

The option is `--config=tests/training/tiny_job.py:FOLDER`. `tiny.write_files` has filled the folder.
"""

from pathlib import Path

import ml_collections

from surm_jax.models import ViTConfig
from surm_jax.training import base_config
from tests.training import tiny


def get_config(files: str) -> ml_collections.ConfigDict:
    ViTConfig.VARIANTS[tiny.NAME] = tiny.GEOMETRY
    config = base_config()
    config.update_from_flattened_dict(tiny.flat_config(Path(files)))
    return config
