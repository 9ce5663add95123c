"""Building a model with pretrained parameters, without ever holding them twice."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.paths import join, require_match
from surm_jax.pretrained import augreg, native
from surm_jax.pretrained.hf import folder as huggingface
from surm_jax.pretrained.sources import locate
from surm_jax.tensor_files import SUFFIX

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
"""Where a parameter is to be, by its path and shape."""


class _Format(NamedTuple):
    # (path, config of the model, targets, fresh paths) -> arrays of the targets
    read: Callable[..., dict[str, jax.Array]]
    # (path, overrides) -> class of the model, its configuration; None where files hold none
    read_config: Callable[..., tuple[type[nnx.Module], Any]] | None


AUGREG = _Format(augreg.read, None)
NATIVE = _Format(native.read, native.read_config)
HUGGING_FACE = _Format(huggingface.read, huggingface.read_config)


def load(
    make_model: Callable[[], nnx.Module],
    checkpoint: Path | None,
    *,
    fresh: Sequence[str] | None = None,
    sharding: Sharding | None = None,
) -> nnx.Module:
    """Returns a model whose parameters come from a checkpoint.

    The model is built abstractly and filled array by array: each is read, brought into our layout, put on its devices
    and forgotten before the next one. Parameters in `fresh` come from the model's own initialisers, in a compiled
    function that returns them alone, so that the others are never computed. Memory on the host: the model where the
    devices are the host's, and the largest array twice.

    Args:
        make_model: builds the model, which keeps its configuration as `config`; called only while JAX traces.
        checkpoint: an AugReg `.npz`, a `.safetensors` of `save_model`, a folder of transformers, or a `.safetensors`
            beside its `config.json`; `None` initialises everything.
        fresh: patterns (`re.fullmatch`) of parameter paths that the checkpoint does not fill. The head by default
            (of RoBERTa both its layers): a new task has its own classes, even where their number agrees. `()` loads
            the head as well.
        sharding: where each parameter is to be, `(path, shape and dtype) -> sharding`; on the default device if left
            out.

    Raises:
        UserError: the checkpoint does not fit the model (see `surm_jax.pretrained.rules.fill` and
            `surm_jax.pretrained.configs.require_same`), its format is unknown, or a pattern matches no parameter.

    >>> from surm_jax.models import ViT, ViTConfig
    >>> config = ViTConfig.from_variant("digits", num_classes=10)
    >>> load(lambda: ViT(config, rngs=nnx.Rngs(0)), None).head.kernel.shape
    (64, 10)
    """
    model = nnx.eval_shape(make_model)
    graphdef, state = nnx.split(model)
    variables = {join(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    shapes = {path: _placed(path, variable, sharding) for path, (_, variable) in variables.items()}
    if checkpoint is None:
        values = _initial(make_model, shapes)
    else:
        fresh = model.config.new_head if fresh is None else fresh
        fresh_paths = {path for pattern in fresh for path in require_match(pattern, list(variables), "parameter")}
        targets = {path: shape for path, shape in shapes.items() if path not in fresh_paths}
        values = _format_of(checkpoint).read(checkpoint, model.config, targets, fresh_paths)
        values |= _initial(make_model, {path: shapes[path] for path in fresh_paths})
    filled = [(path, variable.copy(values[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def model_config(checkpoint: Path, **overrides: Any) -> tuple[type[nnx.Module], Any]:
    """Returns the class and the configuration of the model in a checkpoint; nothing else is read.

    Args:
        checkpoint: a `.safetensors` of `save_model`, a folder of transformers, or a `.safetensors` beside its
            `config.json`.
        **overrides: fields of our configuration to set instead of what the checkpoint says.

    Raises:
        UserError: the checkpoint is an `.npz`, which holds no configuration, is damaged or of an unknown kind, or has
            no such field.

    >>> model, config = model_config(locate("digits"), num_classes=5)
    >>> model.__name__, config.width, config.num_classes
    ('ViT', 64, 5)
    """
    read_config = _format_of(checkpoint).read_config
    if read_config is None:
        raise UserError(
            f"{checkpoint} holds no configuration, as no {checkpoint.suffix} file does: name a variant, such as "
            "'B/16' (surm_jax.models.VARIANTS)"
        )
    return read_config(checkpoint, overrides)


def from_pretrained(
    source: str | os.PathLike,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    fresh: Sequence[str] | None = None,
    sharding: Sharding | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nnx.Module:
    """Returns the model in a checkpoint: finds it, fetches it where needed, reads its configuration, and fills it.

    Args:
        source: what `locate` takes: a folder of transformers, a file, "hf://owner/name", an http(s) URL, "augreg",
            "digits".
        variant: the model in an `.npz` and of "augreg", which hold no configuration (`surm_jax.models.VARIANTS`).
        num_classes: outputs of a new head; the checkpoint's own head if left out.
        fresh: patterns of parameters to initialise instead of reading. By default the head where `num_classes` is
            given, and nothing otherwise.
        sharding: where each parameter is to be, as in `load`.
        seed: of what is initialised.
        **overrides: fields of the configuration to set instead of the checkpoint's, such as `dtype`, `param_dtype`,
            `dropout`, or `image_size`, to which position embeddings are resized.

    Raises:
        UserError: as `locate`, `model_config` and `load`; or a variant is missing or too many.

    >>> model = from_pretrained("digits", num_classes=5, dtype="bfloat16")
    >>> model.head.kernel.shape, model.config.depth
    ((64, 5), 4)
    """
    checkpoint = locate(os.fspath(source), variant)
    if checkpoint is None:
        raise UserError(f"{source!r} is no checkpoint: build the model itself, surm_jax.models.ViT(config, rngs=...)")
    fields = overrides if num_classes is None else {"num_classes": num_classes, **overrides}
    if _format_of(checkpoint).read_config is not None:
        if variant is not None:
            raise UserError(f"{checkpoint} says itself which model it holds: leave out variant={variant!r}")
        model, config = model_config(checkpoint, **fields)
    else:
        if variant is None or num_classes is None:
            raise UserError(f"{checkpoint} holds no configuration: give variant=, such as 'B/16', and num_classes=")
        model, config = ViT, ViTConfig.from_variant(variant, **fields)
    if fresh is None and num_classes is None:
        fresh = ()
    return load(lambda: model(config, rngs=nnx.Rngs(seed)), checkpoint, fresh=fresh, sharding=sharding)


def _placed(path: str, variable: nnx.Variable, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    return shape if sharding is None else shape.update(sharding=sharding(path, shape))


def _initial(make_model: Callable[[], nnx.Module], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns the initial values of some parameters; the compiler drops the work for all others."""

    def init() -> dict[str, jax.Array]:
        state = nnx.to_flat_state(nnx.state(make_model()))
        return {join(path): variable[...] for path, variable in state if join(path) in shapes}

    if not shapes:
        return {}
    return jax.jit(init, out_shardings={path: shape.sharding for path, shape in shapes.items()})()


def _format_of(checkpoint: Path) -> _Format:
    """Returns the format of a checkpoint, which its suffix and its header tell."""
    if checkpoint.is_dir():
        return HUGGING_FACE
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint file {checkpoint}")
    if checkpoint.suffix == ".npz":
        return AUGREG
    if checkpoint.suffix == SUFFIX:
        return NATIVE if native.is_native(checkpoint) else HUGGING_FACE
    hint = f": pass its folder {checkpoint.parent} instead" if checkpoint.suffix == ".json" else ""
    pickled = " (pickles are not loaded: loading them can run any code)"
    raise UserError(
        f"{checkpoint} has the suffix {checkpoint.suffix!r}; checkpoints are .npz or {SUFFIX} files, or folders of "
        f"transformers{pickled if checkpoint.suffix in huggingface.PICKLE_SUFFIXES else hint}"
    )
