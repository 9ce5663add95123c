"""Building a model with pretrained parameters, without ever holding them twice."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
from flax import nnx

from surm_jax.errors import UserError, did_you_mean
from surm_jax.pretrained import augreg, native

READERS = {".npz": augreg.read, native.SUFFIX: native.read}
"""Formats by suffix: `(path, config of the model, targets, fresh paths) -> arrays of the targets`."""


def load(
    make_model: Callable[[], nnx.Module],
    checkpoint: Path | None,
    *,
    fresh: Sequence[str] = (r"head/.*",),
) -> nnx.Module:
    """Returns a model whose parameters come from a checkpoint.

    The model is built abstractly and filled array by array. Parameters in `fresh` come from the model's own
    initialisers, in a compiled function that returns them alone, so that the others are never computed.

    Args:
        make_model: builds the model, which keeps its configuration as `config`; called only while JAX traces.
        checkpoint: an AugReg `.npz` or a `.safetensors` of `save_model`; `None` initialises everything.
        fresh: patterns (`re.fullmatch`) of parameter paths that the checkpoint does not fill. The head by default: a
            new task has its own classes, even where their number agrees. `()` loads the head as well.

    Raises:
        UserError: the file does not fit the model (see `surm_jax.pretrained.rules.fill`), its format is unknown, or a
            pattern matches no parameter.

    >>> from surm_jax.models import ViT, ViTConfig
    >>> config = ViTConfig.from_variant("digits", num_classes=10)
    >>> load(lambda: ViT(config, rngs=nnx.Rngs(0)), None).head.kernel.shape
    (64, 10)
    """
    model = nnx.eval_shape(make_model)
    graphdef, state = nnx.split(model)
    variables = {_join(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    if checkpoint is None:
        values = _initial(make_model, variables)
    else:
        fresh_paths = _matching(fresh, variables)
        targets = {
            path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
            for path, (_, variable) in variables.items()
            if path not in fresh_paths
        }
        read = _reader(checkpoint)
        values = {**read(checkpoint, model.config, targets, fresh_paths), **_initial(make_model, fresh_paths)}
    filled = [(path, variable.copy(values[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _join(path: Sequence[object]) -> str:
    return "/".join(map(str, path))


def _initial(make_model: Callable[[], nnx.Module], paths: Collection[str]) -> dict[str, jax.Array]:
    """Returns the initial values of some parameters; the compiler drops the work for all others."""

    @jax.jit
    def init() -> dict[str, jax.Array]:
        state = nnx.to_flat_state(nnx.state(make_model()))
        return {_join(path): variable[...] for path, variable in state if _join(path) in paths}

    return init() if paths else {}


def _matching(patterns: Sequence[str], paths: Mapping[str, object]) -> set[str]:
    """Returns the paths that some pattern matches; each pattern must match one."""
    matched = set()
    for pattern in patterns:
        found = {path for path in paths if re.fullmatch(pattern, path)}
        if not found:
            raise UserError(f"the pattern {pattern!r} of fresh parameters matches none{did_you_mean(pattern, paths)}")
        matched |= found
    return matched


def _reader(checkpoint: Path) -> Callable[..., dict[str, jax.Array]]:
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint file {checkpoint}")
    if checkpoint.suffix not in READERS:
        raise UserError(
            f"{checkpoint} has the suffix {checkpoint.suffix!r}; checkpoints are {' or '.join(READERS)} files"
        )
    return READERS[checkpoint.suffix]
