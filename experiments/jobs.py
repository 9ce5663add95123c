"""Jobs by the name that `launch.py --config=` knows them by."""

import runpy
from pathlib import Path

import ml_collections

from surm_jax.errors import UserError


def load_job(name: str) -> ml_collections.ConfigDict:
    """Returns the configuration that `FILE.py`, or `FILE.py:ARGUMENT`, makes.

    Raises:
        UserError: if there is no such file, it makes no configuration, or its argument is wrong.
    """
    file, _, argument = name.partition(":")
    if not Path(file).is_file():
        raise UserError(f"there is no configuration {file!r}, such as configs/digits.py")
    make = runpy.run_path(file).get("get_config")
    if make is None:
        raise UserError(f"{file} has no function get_config, which makes the configuration of a job")
    return make(argument) if argument else make()
