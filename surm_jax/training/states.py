"""What the frozen part of a model gives for each example: computed once, stored, and read in every epoch.

A model can be cut before a block or before its head (`Model.before`). If nothing that is trained lies before the cut,
and if neither augmentation nor dropout changes anything, the state at the cut is always the same for an example. It is
then computed in one pass over the examples, and the training and evaluation steps begin with it (`Model.after`). The
pass over a split is made when its states are first used.

The name of a file of states is a digest of everything that the states depend on: the frozen arrays before the cut, the
data and how it is prepared, the settings of the model, the code of models and data, and the version of JAX. So a later
run with another seed or another learning rate finds the file.
"""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from surm_jax.data import States, digest_of
from surm_jax.data.states import MOST_BYTES, read_rows, writing_rows
from surm_jax.devices.mesh import put_batch, replicated, with_whole_base
from surm_jax.devices.processes import all_agree, is_first
from surm_jax.errors import UserError
from surm_jax.files import cache_root, is_finite
from surm_jax.models.base import model_class
from surm_jax.record.inputs import describe_files
from surm_jax.record.progress import track
from surm_jax.tasks.base import Batch, SplitInputs, Task
from surm_jax.training.partition import Arrays, Partition, cut_before

FOLDER = "states"


class _NotStoredError(Exception):
    """The states cannot be stored. The message says why."""


class Frozen(NamedTuple):
    """An adapted model, of which the part before a cut is to be computed once.

    Attributes:
        partition: Puts trained arrays and frozen state together into the model.
        trained: The trained arrays.
        frozen: The frozen state, on the devices of the mesh.
        base: The fingerprint of the frozen arrays.
    """

    partition: Partition
    trained: Arrays
    frozen: nnx.State
    base: Mapping[str, str]


def with_states(
    task: Task, model: Frozen, mesh: jax.sharding.Mesh, taken: int, check: Callable[[], None]
) -> tuple[Task, Callable[..., Any]]:
    """Store what the frozen part of a model gives for the examples, where this is possible.

    If something prevents it although nothing is trained before some cut, one line on the standard error says what.
    Collective: call it from every process.

    Args:
        task: The task.
        model: The adapted model.
        mesh: The device mesh.
        taken: The number of examples that the run takes in all its steps.
        check: A function that is called between batches. It may raise an exception, which ends the pass.

    Returns:
        The task that reads states instead of inputs, and the function from the model and a batch of them to its
        outputs. If nothing is stored, they are the given task, and its `outputs`.
    """
    geometry = task.model_config
    trained = [name for slot in model.partition.slots for name in slot.names]
    cut = cut_before(trained, model_class(geometry), getattr(geometry, "depth", 0))
    if cut == 0:
        return task, task.outputs
    try:
        _require_gain(task, taken)
        store = _Store(task, model, mesh, cut, check)
        store["train"]  # The pass over the training examples shows whether states can be stored.
    except _NotStoredError as error:
        _say(f"the frozen part of the model is computed at every step: {error}")
        return task, task.outputs

    def forward(model: Any, batch: Batch, key: jax.Array | None) -> Any:
        return task.outputs(cast(nnx.Module, functools.partial(model.after, cut)), batch, key)

    return task.with_states(store), forward


def _require_gain(task: Task, taken: int) -> None:
    """Check that the states at a cut never change, and that computing them once takes less time.

    Raises:
        _NotStoredError: They may change, or few examples are used twice.
    """
    if dropout := getattr(task.model_config, "dropout", 0.0):
        raise _NotStoredError(f"config.model.dropout={dropout} changes it at every step")
    if taken < task.examples:
        raise _NotStoredError(f"the run takes only {taken:,} of {task.examples:,} examples, each once")


class _Store(Mapping[str, States]):
    """The states of the splits of a task, by split. They are read or computed when they are first asked for.

    This is collective: all processes must ask for the same split.

    Args:
        task: The task.
        model: The adapted model.
        mesh: The device mesh.
        cut: The cut at which the states are.
        check: See `with_states`.

    Attributes:
        inputs: What the model reads, by split.

    Raises:
        _NotStoredError: The inputs are not known, or the states need too much place.
    """

    def __init__(self, task: Task, model: Frozen, mesh: jax.sharding.Mesh, cut: int, check: Callable[[], None]):
        self._task, self._mesh, self._check = task, mesh, check
        self._found: dict[str, States] = {}
        self.inputs = {split: _inputs(task, split) for split in ("train", *task.splits)}
        self._key = _key(task, model, cut)
        # Nothing that is trained may have an effect on the states. If it had, they would be NaN, and not be stored.
        absent = {path: jnp.full(array.shape, jnp.nan, array.dtype) for path, array in model.trained.items()}
        absent = jax.device_put(absent, replicated(mesh))

        def state(trained: Arrays, frozen: nnx.State, batch: Batch) -> jax.Array:
            whole = model.partition.merge(trained, frozen)
            return task.forward(cast(nnx.Module, functools.partial(whole.before, cut)), batch, None)

        state = with_whole_base(state, mesh)
        step = jax.jit(
            lambda trained, frozen, batch: (state(trained, frozen, batch), batch["index"], batch["mask"]),
            out_shardings=replicated(mesh),
        )
        self._step = functools.partial(step, absent, model.frozen)
        shapes = next(iter(task.train_shapes().values()))
        self._one = jax.eval_shape(state, absent, model.frozen, shapes)
        self._per_token = cut <= task.model_config.depth
        need = sum(math.prod(self._form(inputs)[0]) for inputs in self.inputs.values()) * self._one.dtype.itemsize
        if need > MOST_BYTES:
            raise _NotStoredError(f"its results for all examples would take {need:,} bytes, more than {MOST_BYTES:,}")

    def _form(self, inputs: SplitInputs) -> tuple[tuple[int, ...], np.ndarray | None]:
        """Return the shape of the stored array for a split, and the offsets of the examples if its rows are tokens."""
        if inputs.offsets is None or not self._per_token:
            return (inputs.examples, *self._one.shape[1:]), None
        return (int(inputs.offsets[-1]), *self._one.shape[2:]), inputs.offsets

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, split: str) -> States:
        if split not in self._found:
            try:
                self._found[split] = self._states(split)
            except _NotStoredError as error:
                if not self._found:
                    raise
                raise UserError(f"the frozen part of the model, computed for {split}: {error}") from None
        return self._found[split]

    def _states(self, split: str) -> States:
        """Return the states of a split. Read them if they are stored, otherwise compute and store them.

        If the first states were stored but these cannot be, they are only kept in memory.

        Raises:
            _NotStoredError: The first states cannot be stored.
        """
        shape, offsets = self._form(self.inputs[split])
        path = cache_root() / FOLDER / digest_of(self._key, self.inputs[split].identity, f"{shape} {self._one.dtype}")

        def read() -> np.ndarray | None:
            with contextlib.suppress(OSError):
                return read_rows(path, shape, self._one.dtype)
            return None

        rows = read()
        if not all_agree(rows is not None):
            with contextlib.ExitStack() as stack:
                try:
                    found, why = stack.enter_context(writing_rows(path, shape, self._one.dtype)), ""
                except OSError as error:
                    found, why = np.zeros(shape, self._one.dtype), f"cannot write {path} ({error.strerror})"
                if not all_agree(not why) and not self._found:
                    raise _NotStoredError(why or "another process cannot write what it gives")
                self._compute(split, States(found, offsets), why or str(path))
            rows = read()
            if not all_agree(rows is not None):
                if not self._found:
                    raise _NotStoredError(f"{path} was removed at once")
                rows = found
        assert rows is not None
        return States(rows, offsets)

    def _compute(self, split: str, states: States, where: str) -> None:
        """Compute the states of a split in one pass over its examples, and put them into `states`.

        Raises:
            _NotStoredError: A state is not finite, or the batches do not hold every example once.
        """
        began, count = time.monotonic(), 0
        outputs: list[tuple[jax.Array, jax.Array, jax.Array]] = []

        def keep() -> int:
            state, index, kept = map(np.asarray, outputs.pop(0))
            if not is_finite(state[kept]):
                raise _NotStoredError("it gives NaN or infinity, or depends on what is trained")
            states.put(index[kept], state[kept])
            return int(kept.sum())

        for batch in track(self._task.eval_batches(split), f"compute the frozen part for {split}"):
            self._check()
            outputs.append(self._step(put_batch(batch, self._mesh)))
            count += keep() if len(outputs) > 1 else 0  # While the devices compute a batch, the host stores another.
        while outputs:
            count += keep()
        if count != self.inputs[split].examples:
            raise _NotStoredError(f"{split} has {self.inputs[split].examples} examples, but its batches hold {count}")
        _say(f"computed the frozen part for {count:,} examples of {split} in {time.monotonic() - began:.1f} s: {where}")


def _inputs(task: Task, split: str) -> SplitInputs:
    inputs = task.inputs(split)
    if isinstance(inputs, str):
        raise _NotStoredError(inputs)
    return inputs


def _key(task: Task, model: Frozen, cut: int) -> str:
    """Describe everything except the input that determines the state at a cut, as text for the name of a file."""
    geometry = task.model_config
    kind, files = model_class(geometry), tuple(getattr(task.dataset, "files", ()))
    modules = [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith(("surm_jax.models", "surm_jax.data", "surm_jax.preparation"))
        or name in (kind.__module__, type(task).__module__)
    ]
    parts = {
        "base": {path: digest for path, digest in model.base.items() if cut_before([path], kind, geometry.depth) < cut},
        "data": describe_files(files)["content"] if files else None,
        "model": {name: value for name, value in dataclasses.asdict(geometry).items() if name != "num_classes"},
        "code": describe_files(sorted({Path(str(module.__file__)) for module in modules}))["content"],
        "versions": [jax.__version__, flax.__version__, jax.default_backend()],
        "precision": str(jax.config.jax_default_matmul_precision),  # type: ignore[attr-defined]
        "cut": [kind.__name__, cut],
    }
    return json.dumps(parts, sort_keys=True)


def _say(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr, flush=True)
