"""Checkpoints of a run: what is trained, the optimiser, the place in the data; never the base weights.

Orbax writes a step under a temporary name and renames it when it is complete. Kept are the last two and the one with
the best evaluation. Restoring is strict: another structure, other base weights or a single flipped bit is an error that
says so.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from surm_jax.errors import UserError
from surm_jax.peft import check_fingerprint
from surm_jax.training.step import TrainState
from surm_jax.training.workdir import config_changes


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      state: arrays, where the template's were.
      data: the state of the data iterator.
      seconds: how long the run had worked.
      score: of the evaluation at this step (the task's first metric), or None if there was none.
    """

    state: TrainState
    data: dict[str, Any]
    seconds: float
    score: float | None


class Checkpoints:
    """The checkpoints in one folder. Use as a context manager.

    Args:
      folder: made if it is not there.
      base: the fingerprint of the frozen weights.
      config: the configuration of the run.

    Raises:
      UserError: if the folder cannot be read or made.
    """

    def __init__(self, folder: str | os.PathLike, base: Mapping[str, str], config: Mapping[str, Any]):
        self.folder = Path(folder).absolute()
        self._base, self._config = dict(base), dict(config)
        keep = ocp.training.preservation_policies
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=keep.AnyPreservationPolicy(
                    [
                        # Two: while the last one is written again, or if it is damaged, there is another.
                        keep.LatestN(2),
                        keep.BestN(
                            get_metric_fn=lambda metrics: metrics["score"],
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            )
        except Exception as error:  # Orbax raises whatever reading a damaged folder raises.
            for step in self._steps():
                if not _has_readable_metrics(self.folder / str(step)):
                    raise UserError(self._damaged(step, _first_line(error))) from error
            raise UserError(f"cannot open the checkpoints in {self.folder}: {_first_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, or None."""
        return self._orbax.latest.step if self._orbax.latest else None

    def save(self, state: TrainState, data: dict[str, Any], seconds: float, score: float | None = None) -> None:
        """Writes a checkpoint, and removes those that are no longer among the last two or the best.

        A checkpoint of the same step is replaced.

        Args:
          state: the arrays.
          data: the state of the data iterator, as JSON values.
          seconds: how long the run has worked.
          score: of the evaluation at this step, if there was one; the larger the better.

        Raises:
          UserError: if it cannot be written; earlier checkpoints stay.
        """
        step = int(state.step)
        record = {
            "config": self._config,
            "base": self._base,
            "data": data,
            "seconds": seconds,
            "score": score,
            **_digest(state),
        }
        metrics = None if score is None else {"score": score}
        try:
            self._orbax.save(
                step,
                state._asdict(),
                overwrite=step == self.latest,
                metrics=metrics,
                custom_metadata={"record": record, "sha256": _sha256(record)},
            )
        except Exception as error:
            raise UserError(
                f"cannot write the checkpoint of step {step} in {self.folder}: {_first_line(error)}"
            ) from error

    def restore(self, template: TrainState) -> Restored:
        """Reads the last checkpoint.

        Args:
          template: a state of the same structure, on the devices where the arrays shall go.

        Raises:
          UserError: if it is damaged, of another structure, or of another base.
        """
        step = self.latest
        path = self.folder / str(step)
        try:
            metadata = self._orbax.metadata(step).custom_metadata
            recorded = metadata["record"]
            intact = metadata["sha256"] == _sha256(recorded)
        except Exception as error:
            raise UserError(self._damaged(step, _first_line(error))) from error
        if not intact:
            raise UserError(self._damaged(step, "its metadata is not what was saved"))
        if changes := config_changes(recorded["config"], self._config):
            raise UserError(f"the checkpoint {path} is of another run; there {'; '.join(changes[:5])}")
        check_fingerprint(self._base, recorded["base"], f"the checkpoint {path}")
        expected = _digest(template)["leaves"]
        if recorded["leaves"] != expected:
            different = sorted(set(expected.items()) ^ set(recorded["leaves"].items()))
            names = ", ".join(dict.fromkeys(name for name, _ in different[:6]))
            raise UserError(f"the checkpoint {path} does not fit this run: they differ in {names}")
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), template
        )
        try:
            state = TrainState(**self._orbax.load(step, abstract._asdict()))
        except Exception as error:
            raise UserError(self._damaged(step, _first_line(error))) from error
        if _digest(state)["arrays"] != recorded["arrays"]:
            raise UserError(self._damaged(step, "its arrays are not those that were saved"))
        return Restored(state, recorded["data"], recorded["seconds"], recorded["score"])

    def _damaged(self, step: int, why: str) -> str:
        others = [other for other in self._steps() if other != step]
        advice = f"go on from step {max(others)}" if others else "start from the beginning"
        return f"the checkpoint {self.folder / str(step)} is damaged ({why}); delete that folder to {advice}"

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]


def _has_readable_metrics(checkpoint: Path) -> bool:
    # The one file that Orbax reads of every checkpoint when it opens their folder, to know the best.
    try:
        return isinstance(json.loads((checkpoint / "metrics" / "metrics").read_bytes()), dict)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def _digest(state: TrainState) -> dict[str, Any]:
    """The names, shapes and dtypes of all leaves, and one SHA-256 over their bits."""
    leaves, sha256 = {}, hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = f"{leaf.dtype}{list(leaf.shape)}"
        sha256.update(name.encode())
        sha256.update(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data)
    return {"leaves": leaves, "arrays": sha256.hexdigest()}


def _sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
