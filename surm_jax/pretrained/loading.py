"""Building a model with pretrained parameters, without ever holding them twice."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.paths import join, require_match
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
    variables = {join(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    if checkpoint is None:
        values = _initial(make_model, variables)
    else:
        fresh_paths = {path for pattern in fresh for path in require_match(pattern, list(variables), "parameter")}
        targets = {
            path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
            for path, (_, variable) in variables.items()
            if path not in fresh_paths
        }
        read = _reader(checkpoint)
        values = {**read(checkpoint, model.config, targets, fresh_paths), **_initial(make_model, fresh_paths)}
    filled = [(path, variable.copy(values[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _initial(make_model: Callable[[], nnx.Module], paths: Collection[str]) -> dict[str, jax.Array]:
    """Returns the initial values of some parameters; the compiler drops the work for all others."""

    @jax.jit
    def init() -> dict[str, jax.Array]:
        state = nnx.to_flat_state(nnx.state(make_model()))
        return {join(path): variable[...] for path, variable in state if join(path) in paths}

    return init() if paths else {}


def _reader(checkpoint: Path) -> Callable[..., dict[str, jax.Array]]:
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint file {checkpoint}")
    if checkpoint.suffix not in READERS:
        raise UserError(
            f"{checkpoint} has the suffix {checkpoint.suffix!r}; checkpoints are {' or '.join(READERS)} files"
        )
    return READERS[checkpoint.suffix]
