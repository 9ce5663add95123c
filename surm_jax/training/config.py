"""The configuration of a run: every key, its default, its unit, and its check.

The files in `configs/` start from `base_config()` and change what they need, so every key can be overridden on the
command line (`--config.optim.steps=100`). `parse` turns a configuration into frozen dataclasses, once; nothing else
reads it.
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_collections

from surm_jax.data import Augment
from surm_jax.errors import UserError, did_you_mean
from surm_jax.models import REMAT, variant_names
from surm_jax.paths import compile_pattern
from surm_jax.peft import METHODS, Method, make_method
from surm_jax.structured import EXECUTIONS

DECAYS = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")
GEOMETRY = ("image_size", "patch_size", "width", "depth", "heads", "mlp_width")


def _one_of(key: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f"config.{key}: unknown {value!r}{did_you_mean(value, known)} (known: {', '.join(known)})")


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"config.{key} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model."""

    # One of surm_jax.models.variant_names("images"), such as "B/16", or for text of variant_names("text"), such as
    # "base"; empty: what the checkpoint itself describes.
    variant: str = "B/16"
    # Where the weights come from: "augreg" (the official file of the variant), "digits" (shipped with the package),
    # "hf://owner/name" (the Hugging Face Hub), a folder of transformers, a file, a URL, or "none" for random weights.
    # A text model's tokeniser comes from the same folder.
    checkpoint: str = "augreg"
    # Outputs of the new head; 0: as many as the data set has classes, one where labels are numbers.
    num_classes: int = 0
    # Geometry: the side of the square input and of a patch in pixels, features, blocks, ...; 0: the variant's. Text has
    # neither image_size nor patch_size.
    image_size: int = 0
    patch_size: int = 0
    width: int = 0
    depth: int = 0
    heads: int = 0
    mlp_width: int = 0
    dropout: float = 0.0
    # Dtype of the computation, "float32" or "bfloat16".
    dtype: str = "float32"
    # Dtype of the base's parameters; what is trained is float32 always.
    param_dtype: str = "float32"
    # What of the activations inside a block is computed a second time for the gradient instead of being kept: "none",
    # "block" (all) or "dots" (all but the outputs of layers); see surm_jax.models.REMAT.
    remat: str = "none"
    # Whether equal blocks are one program that is run for each of them, which compiles as fast for many as for one.
    # Values are the same to rounding.
    scan_layers: bool = False

    def __post_init__(self):
        if self.variant:
            _one_of("model.variant", self.variant, variant_names())
        _one_of("model.dtype", self.dtype, DTYPES)
        _one_of("model.param_dtype", self.param_dtype, DTYPES)
        _one_of("model.remat", self.remat, REMAT)
        for name in ("num_classes", *GEOMETRY):
            _at_least(f"model.{name}", getattr(self, name), 0)
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.model.dropout must lie in [0, 1), got {self.dropout}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set and its batches."""

    # A name that surm_jax.data.load knows: "digits_5to9", a TFDS name such as "cifar10" or "glue/rte", or a path to an
    # .npz file.
    name: str = "cifar10"
    # The folder of prepared TFDS sets; empty: $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
    dir: str = ""
    # The only classes of images, by name, on the command line "('cat','dog')": labels count them in this order; empty:
    # all.
    classes: tuple[str, ...] = ()
    # Only so many training examples, the same ones in every run: a smaller number takes some of a larger one's. 0: all.
    train_examples: int = 0
    # What training images go through: "none", "affine", "crop_flip".
    augment: str = "crop_flip"
    # Lengths in tokens to which batches of text are filled up: the smallest that holds the longest text of the batch.
    # Each is compiled for; texts are cut off at the last.
    lengths: tuple[int, ...] = (16, 32, 64, 96, 128)
    # Training examples, of those above, that are held out and evaluated instead of the test set while training. The
    # test set is then looked at once, at the end.
    holdout: int = 0
    # Images that may be skipped because they cannot be read, in each split; each is named, and the result counts them.
    max_corrupt: int = 0
    # Examples per step, over all devices and accumulated micro-batches.
    batch_size: int = 64
    eval_batch_size: int = 256

    def __post_init__(self):
        _one_of("data.augment", self.augment, typing.get_args(Augment))
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise UserError(f"config.data.lengths must be positive and increase, got {self.lengths}")
        if len(self.classes) == 1:
            raise UserError(
                f"config.data.classes must name two or more, such as \"('cat','dog')\", got {self.classes[0]!r} alone"
            )
        _at_least("data.train_examples", self.train_examples, 0)
        _at_least("data.holdout", self.holdout, 0)
        _at_least("data.max_corrupt", self.max_corrupt, 0)
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.eval_batch_size", self.eval_batch_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """A rule of its own for some modules: `{"target": r"blocks/0/.*", "method": "lora", "settings": {"rank": 4}}`."""

    # A preset of the model, or a regular expression for module paths.
    target: str
    # One of METHODS that is an update or a bottleneck; empty: these modules get nothing.
    method: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # For updates of fused kernels: how many equal blocks of output features there are, and which are updated.
    parts: int = 1
    which: tuple[int, ...] = ()

    def __post_init__(self):
        if self.method:
            _one_of("peft.rules.*.method", self.method, METHODS)
            make_method(self.method, dict(self.settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What is adapted, and how.

    `methods` has the settings of every method by name; in the configuration they stand beside the other keys:
    `--config.peft.lora.rank=4`.
    """

    # One of METHODS.
    method: str = "circulant"
    # A preset of the model (surm_jax.models.TARGETS), or a regular expression for module paths; empty: the preset that
    # the method is meant for; "none": what `rules` says and nothing else.
    target: str = ""
    # Rules that come before the one of `method` and `target`: the first that matches a module counts.
    rules: tuple[RuleConfig, ...] = ()
    # How the product with an update is computed: one of EXECUTIONS. All give the same to rounding.
    execution: str = "auto"
    # Patterns of the paths of parameters that every method trains besides.
    train: tuple[str, ...] = ("head/.*",)
    methods: Mapping[str, Method] = dataclasses.field(
        default_factory=lambda: {name: cls() for name, cls in METHODS.items()}
    )

    def __post_init__(self):
        _one_of("peft.method", self.method, METHODS)
        _one_of("peft.execution", self.execution, EXECUTIONS)
        compile_pattern(self.target)
        for pattern in self.train:
            compile_pattern(pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """The optimiser's settings for the trained parameters whose path `pattern` matches as a whole."""

    pattern: str
    # Peak learning rate; 0: the method's, from optim.learning_rate.
    learning_rate: float = 0.0
    # Decoupled weight decay, times the learning rate.
    weight_decay: float = 0.0

    def __post_init__(self):
        compile_pattern(self.pattern)
        _at_least("optim.groups.*.learning_rate", self.learning_rate, 0)
        _at_least("optim.groups.*.weight_decay", self.weight_decay, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """Groups of trained parameters; the first whose pattern matches a parameter takes it."""

    adapter: GroupConfig = GroupConfig(pattern=r"(.*/)?(delta|branch)/.*")
    head: GroupConfig = GroupConfig(pattern=r"head/.*")
    norm: GroupConfig = GroupConfig(pattern=r"(.*[/_])?norm\d*/.*")
    bias: GroupConfig = GroupConfig(pattern=r".*/bias")
    rest: GroupConfig = GroupConfig(pattern=r".*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Adam where the weight decay is 0), its schedule, and the loss."""

    # Number of updates.
    steps: int = 1000
    # Passes over the training set, rounded up to whole steps; 0: as many as `steps` says.
    epochs: float = 0.0
    # Peak learning rate by method: each needs its own.
    learning_rate: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {name: method.learning_rate for name, method in METHODS.items()}
    )
    groups: GroupsConfig = GroupsConfig()
    # Share of the steps that is linear warm-up from 0; then decay to 0 at the last step: "cosine", "linear", or
    # "constant".
    warmup_ratio: float = 0.0
    decay: str = "cosine"
    # Largest global norm of the gradient; 0: no clipping.
    clip_norm: float = 1.0
    # Micro-batches per update: the batch is worked on in so many parts, one after the other.
    accumulate: int = 1
    label_smoothing: float = 0.0

    def __post_init__(self):
        _one_of("optim.decay", self.decay, DECAYS)
        _at_least("optim.steps", self.steps, 1)
        _at_least("optim.accumulate", self.accumulate, 1)
        _at_least("optim.clip_norm", self.clip_norm, 0)
        for method, rate in self.learning_rate.items():
            _at_least(f"optim.learning_rate.{method}", rate, 0)
        _at_least("optim.epochs", self.epochs, 0)
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"config.optim.warmup_ratio must lie in [0, 1), got {self.warmup_ratio}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"config.optim.label_smoothing must lie in [0, 1), got {self.label_smoothing}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often a run speaks and saves, in steps. 0 means at the end only."""

    metrics_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _at_least(f"log.{field.name}", getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are used."""

    # Devices over which the batch is split; 0: all there are, divided by `fsdp`.
    data: int = 0
    # Devices over which the batch and the large arrays of the frozen base are split.
    fsdp: int = 1

    def __post_init__(self):
        _at_least("mesh.data", self.data, 0)
        _at_least("mesh.fsdp", self.fsdp, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    # One run per seed; several go into folders of their own, and the result has mean and standard deviation.
    seeds: tuple[int, ...] = (0,)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    peft: PeftConfig = PeftConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"config.seeds must hold one or more different numbers from 0 on, got {self.seeds}")
        if self.data.batch_size % self.optim.accumulate:
            raise UserError(
                f"config.data.batch_size={self.data.batch_size} does not divide into"
                f" config.optim.accumulate={self.optim.accumulate} equal micro-batches"
            )
        if self.peft.execution == "fused" and self.model.dtype != "float32":
            raise UserError(
                f"config.peft.execution=fused adds updates to the kernels, where config.model.dtype={self.model.dtype}"
                " would round them away: choose auto, fft or dense"
            )
        if self.peft.method not in self.optim.learning_rate:
            raise UserError(f"config.optim.learning_rate has none for config.peft.method={self.peft.method}")


def with_steps(config: RunConfig, examples: int) -> RunConfig:
    """Returns the configuration with the number of steps that its epochs over so many examples take.

    >>> config = dataclasses.replace(RunConfig(), optim=OptimConfig(epochs=1.5))
    >>> with_steps(config, examples=100).optim.steps
    3
    """
    if not config.optim.epochs:
        return config
    steps = math.ceil(config.optim.epochs * examples / config.data.batch_size)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps))


def base_config() -> ml_collections.ConfigDict:
    """Returns a configuration with every key at its default.

    >>> config = base_config()
    >>> config.peft.lora.rank, config.optim.groups.head.weight_decay
    (1, 0.0)
    """
    return ml_collections.ConfigDict(to_dict(RunConfig()))


def keys(config: ml_collections.ConfigDict) -> list[str]:
    """Returns all keys of a configuration, sections included, joined by dots.

    >>> "peft.lora.rank" in keys(base_config())
    True
    """
    found = []
    for key, value in config.items():
        found.append(key)
        if isinstance(value, ml_collections.ConfigDict):
            found += [f"{key}.{below}" for below in keys(value)]
    return found


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries; `parse` reads them back."""
    tree = dataclasses.asdict(config)
    tree["peft"].update(tree["peft"].pop("methods"))
    return tree


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> RunConfig:
    """Checks a configuration.

    >>> parse(base_config()).model.variant
    'B/16'

    Raises:
        UserError: for an unknown key (the message names the nearest), a missing one, or a value that cannot be.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    peft = dict(_section(tree.get("peft", {}), "config.peft"))
    settings = [field.name for field in dataclasses.fields(PeftConfig) if field.name != "methods"]
    _known("config.peft", peft, (*settings, *METHODS))
    methods = {
        name: make_method(name, _section(peft.pop(name), f"config.peft.{name}")) for name in METHODS if name in peft
    }
    tree["peft"] = peft
    parsed = _build(RunConfig, tree, "config")
    return dataclasses.replace(
        parsed, peft=dataclasses.replace(parsed.peft, methods={**parsed.peft.methods, **methods})
    )


def _section(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must be a section with keys, got {value!r}")
    return value


def _known(path: str, given: Iterable[str], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{path} has no key {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")


def _build(cls: type, tree: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    _known(path, tree, hints)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in tree:
            raise UserError(f"{path} lacks the key {field.name!r}")
    return cls(**{key: _value(hints[key], value, f"{path}.{key}") for key, value in tree.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, _section(value, path), path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} must be a tuple, got {value!r}")
        return tuple(_value(arguments[0], item, f"{path}.{place}") for place, item in enumerate(value))
    if origin is Mapping and arguments[1] is Any:
        return dict(_section(value, path))
    if origin is Mapping:
        _known(path, _section(value, path), METHODS)
        return {key: _value(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} must be of the type {hint.__name__}, got {value!r}")
    return value
