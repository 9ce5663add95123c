"""Find the data and the weights that a configuration names by relative paths."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from surm_jax import data
from surm_jax.pretrained.sources import is_path
from surm_jax.record.inputs import started_in
from surm_jax.training.config import RunConfig


def resolved(config: RunConfig, workdir: Path) -> RunConfig:
    """Return a configuration in which existing relative paths of data and weights are absolute.

    A relative path is looked for in the working directory, and then in the one where the run was first started.

    Args:
        config: The configuration.
        workdir: The folder of the run.
    """
    folders = [Path.cwd(), *started_in(workdir)]
    name, checkpoint = config.data.name, config.model.checkpoint
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            name=_absolute(name, folders) if data.is_path(name) else name,
            dir=_absolute(config.data.dir, folders) if config.data.dir else "",
        ),
        model=dataclasses.replace(
            config.model, checkpoint=_absolute(checkpoint, folders) if is_path(checkpoint) else checkpoint
        ),
    )


def _absolute(path: str, folders: Iterable[Path]) -> str:
    with contextlib.suppress(RuntimeError):  # There is no such user. The error is raised where the path is opened.
        for folder in folders:
            if (place := folder / Path(path).expanduser()).exists():
                return str(place.absolute())
    return path
