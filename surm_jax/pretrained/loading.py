"""Build models with pretrained parameters, without holding all parameters in memory twice."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.files import open_npz
from surm_jax.models import Model, model_class
from surm_jax.paths import join, require_match
from surm_jax.preparation import Normalization, Preparation
from surm_jax.pretrained.augreg import AugRegCheckpoint
from surm_jax.pretrained.checkpoint import Checkpoint
from surm_jax.pretrained.hf.folder import PICKLE_SUFFIXES, HuggingFaceCheckpoint
from surm_jax.pretrained.native import NativeCheckpoint
from surm_jax.pretrained.sources import locate
from surm_jax.tensor_files import SUFFIX, TensorFile

Sharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
"""A function that returns the sharding of a parameter: `(path, shape and dtype) -> sharding`."""


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a checkpoint file or folder for a `with` block.

    The format is recognised by the suffix of the file and, for safetensors, by the header in the file.

    Raises:
        UserError: There is no such file, its format is unknown, or it is damaged.
    """
    if path.is_dir():
        yield HuggingFaceCheckpoint(path)
        return
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    if path.suffix == ".npz":
        with open_npz(path) as arrays:
            yield AugRegCheckpoint(path, arrays)
    elif path.suffix == SUFFIX:
        with TensorFile(path) as file:
            yield NativeCheckpoint(path, file) if NativeCheckpoint.holds(file) else HuggingFaceCheckpoint(path, file)
    else:
        hint = f": pass its folder {path.parent} instead" if path.suffix == ".json" else ""
        pickled = " (pickles are not loaded: loading them can run any code)"
        raise UserError(
            f"{path} has the suffix {path.suffix!r}; checkpoints are .npz or {SUFFIX} files, or folders of "
            f"transformers{pickled if path.suffix in PICKLE_SUFFIXES else hint}"
        )


def load(
    checkpoint: Path | None,
    make_model: Callable[[], Model],
    *,
    fresh: Sequence[str] | None = None,
    sharding: Sharding | None = None,
) -> Any:
    """Build a model, and read its parameters from a checkpoint.

    The model is first built without arrays (`nnx.eval_shape`). Then the arrays are read one by one, converted to our
    layout and copied to their devices. Parameters that match `fresh` come from the model's initialisers, which run in a
    compiled function that computes only these. The host needs memory for two copies of the largest array, and with the
    CPU backend also for the whole model.

    Args:
        checkpoint: The path of an AugReg `.npz` file, of a `.safetensors` file that `save_model` wrote, of a folder of
            transformers, or of a `.safetensors` file beside its `config.json`. `None` initialises all parameters.
        make_model: A function that builds the model. It runs under `nnx.eval_shape` and `jax.jit`, and never eagerly.
        fresh: Patterns for the paths of parameters that are initialised instead of read. The default is
            `config.new_head`, since a new task has its own classes, even if their number is the same. With `()` the
            head is read too.
        sharding: A function that returns the sharding of each parameter. The default is the default device.

    Raises:
        UserError: The checkpoint does not fit the model (see `surm_jax.pretrained.rules.fill` and
            `surm_jax.pretrained.checkpoint.require_same`), its format is unknown, or a pattern matches no parameter.

    The example has no checkpoint, so all parameters are initialised:

    >>> from surm_jax.models import ViT, ViTConfig
    >>> config = ViTConfig.from_variant("digits", num_classes=10)
    >>> load(None, lambda: ViT(config, rngs=nnx.Rngs(0))).head.kernel.shape
    (64, 10)
    """
    if checkpoint is None:
        return _load(None, make_model, fresh, sharding)
    with open_checkpoint(checkpoint) as opened:
        return _load(opened, make_model, fresh, sharding)


def model_config(checkpoint: Path, variant: str | None = None, **overrides: Any) -> tuple[type[Model], Any]:
    """Return the class and the configuration of the model in a checkpoint, without reading any parameter.

    Args:
        checkpoint: The path of a file or folder in any of the formats that `load` reads.
        variant: The name in `ViTConfig.VARIANTS` of the model in an `.npz` file, which holds no configuration. For all
            other formats it must be `None`.
        **overrides: Fields of our configuration whose values replace those in the checkpoint.

    Raises:
        UserError: The checkpoint is damaged or its format is unknown, an override is not a field of the configuration,
            a variant is missing, or a variant is given although the format holds a configuration.

    The example reads the configuration of a small ViT of width 64, and replaces its number of classes by 5:

    >>> model, config = model_config(locate("digits"), num_classes=5)
    >>> model.__name__, config.width, config.num_classes
    ('ViT', 64, 5)
    """
    with open_checkpoint(checkpoint) as opened:
        config = opened.config(variant, overrides)
    return model_class(config), config


def image_preparation(checkpoint: Path | None) -> Preparation:
    """Return how images are prepared for the model in a checkpoint: resized, cropped, rescaled and normalised.

    For a folder of transformers this is what its `processor_config.json` or `preprocessor_config.json` says. Without
    such settings, images are resized to a square, and their pixels are normalised as the published models expect.

    Args:
        checkpoint: The path that `locate` returned, which is `None` for the name "none".

    Raises:
        UserError: The checkpoint is damaged, or its settings cannot be followed. The message names the setting.

    >>> image_preparation(locate("digits")).normalization
    Normalization(mean=0.5, std=0.5)
    """
    if checkpoint is None:
        return Preparation()
    with open_checkpoint(checkpoint) as opened:
        return opened.preparation()


def image_normalization(checkpoint: Path | None) -> Normalization:
    """Return the mean and the standard deviation with which pixels are normalised (see `image_preparation`)."""
    return image_preparation(checkpoint).normalization


def from_pretrained(
    source: str | os.PathLike,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    fresh: Sequence[str] | None = None,
    sharding: Sharding | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """Return the model that the name of a checkpoint stands for, after downloading it if needed.

    Args:
        source: The name of the checkpoint, as in `locate`: the path of a file or of a folder of transformers,
            "hf://owner/name", an http(s) URL, "augreg" or "digits".
        variant: The name in `ViTConfig.VARIANTS` of the model, for an `.npz` file and for "augreg", which hold no
            configuration.
        num_classes: The number of classes of a new head. If it is not given, the head in the checkpoint is read.
        fresh: Patterns for the paths of parameters that are initialised instead of read. The default is
            `config.new_head` if `num_classes` is given, and otherwise no parameter.
        sharding: A function that returns the sharding of each parameter, as in `load`.
        seed: The seed of the initialised parameters.
        **overrides: Fields of the configuration whose values replace those in the checkpoint, such as `dtype`,
            `param_dtype`, `dropout` or `image_size`. Position embeddings are resized to the image size.

    Raises:
        UserError: The checkpoint cannot be located or read, or does not fit the model. See `locate`, `model_config` and
            `load`.

    The example reads a small ViT of width 64 with 4 blocks, and gives it a new head for 5 classes:

    >>> model = from_pretrained("digits", num_classes=5, dtype="bfloat16")
    >>> model.head.kernel.shape, model.config.depth
    ((64, 5), 4)
    """
    path = locate(os.fspath(source), variant)
    if path is None:
        raise UserError(f"{source!r} is no checkpoint: build the model itself, surm_jax.models.ViT(config, rngs=...)")
    fields = overrides if num_classes is None else {"num_classes": num_classes, **overrides}
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config(variant, fields)
        model = model_class(config)
        if fresh is None and num_classes is None:
            fresh = ()
        return _load(checkpoint, lambda: model(config, rngs=nnx.Rngs(seed)), fresh, sharding)


def _load(
    checkpoint: Checkpoint | None,
    make_model: Callable[[], Model],
    fresh: Sequence[str] | None,
    sharding: Sharding | None,
) -> Any:
    """Build a model, and read its parameters from an open checkpoint. The arguments are those of `load`."""
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
        values = checkpoint.fill(model.config, targets, fresh_paths)
        values |= _initial(make_model, {path: shapes[path] for path in fresh_paths})
    filled = [(path, variable.copy(values[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _placed(path: str, variable: nnx.Variable, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    return shape if sharding is None else shape.update(sharding=sharding(path, shape))


def _initial(make_model: Callable[[], Model], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return the initial values of the parameters in `shapes`, by path. Those of other parameters are not computed."""

    def init() -> dict[str, jax.Array]:
        state = nnx.to_flat_state(nnx.state(make_model()))
        return {join(path): variable[...] for path, variable in state if join(path) in shapes}

    if not shapes:
        return {}
    return jax.jit(init, out_shardings={path: shape.sharding for path, shape in shapes.items()})()
