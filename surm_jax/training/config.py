"""The configuration of a run: every key, its default, its unit, and its check.

The files in `configs/` start from `base_config()` and change what they need, so every key can be overridden on the
command line (`--config.optim.steps=100`). `parse` turns a configuration into frozen dataclasses, once; nothing else
reads it.
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from surm_jax.errors import UserError, did_you_mean, require_one_of
from surm_jax.paths import compile_pattern
from surm_jax.peft import METHODS, Method, make_method
from surm_jax.record.workdir import read_config, relocated
from surm_jax.structured import EXECUTIONS
from surm_jax.tasks.config import DataConfig, ModelConfig, check_at_least, check_fraction

DECAYS = ("cosine", "linear", "constant")


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
            require_one_of("config.peft.rules.*.method", self.method, METHODS)
            make_method(self.method, dict(self.settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What is adapted, and how.

    `methods` holds the settings of every method by name. In the configuration they stand beside the other keys:
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
        require_one_of("config.peft.method", self.method, METHODS)
        require_one_of("config.peft.execution", self.execution, EXECUTIONS)
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
        check_at_least("optim.groups.*.learning_rate", self.learning_rate, 0)
        check_at_least("optim.groups.*.weight_decay", self.weight_decay, 0)


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
        require_one_of("config.optim.decay", self.decay, DECAYS)
        check_at_least("optim.steps", self.steps, 1)
        check_at_least("optim.accumulate", self.accumulate, 1)
        check_at_least("optim.clip_norm", self.clip_norm, 0)
        for method, rate in self.learning_rate.items():
            check_at_least(f"optim.learning_rate.{method}", rate, 0)
        check_at_least("optim.epochs", self.epochs, 0)
        check_fraction("optim.warmup_ratio", self.warmup_ratio)
        check_fraction("optim.label_smoothing", self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often a run speaks and saves, in steps. 0 means at the end only."""

    metrics_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_at_least(f"log.{field.name}", getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are used."""

    # Devices over which the batch is split; 0: all there are, divided by `fsdp`.
    data: int = 0
    # Devices over which the batch and the large arrays of the frozen base are split.
    fsdp: int = 1

    def __post_init__(self):
        check_at_least("mesh.data", self.data, 0)
        check_at_least("mesh.fsdp", self.fsdp, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    # One run per seed; several go into folders of their own, and the result has mean and standard deviation.
    seeds: tuple[int, ...] = (0,)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    peft: PeftConfig = dataclasses.field(default_factory=PeftConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

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


def complete(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Check a configuration that a run saved, and return it with the defaults of keys that it lacks."""
    return to_dict(parse(tree))


def saved_config(workdir: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read the configuration of the run in a folder.

    Args:
        workdir: The folder of the run.
        overrides: Values by key: where its data and weights are now, and how it is computed
            (`surm_jax.record.workdir.CHANGEABLE`).

    Raises:
        UserError: There is no run, its configuration is damaged, or another key is overridden.
    """
    return parse(relocated(read_config(workdir, complete), overrides or {}))


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
