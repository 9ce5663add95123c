"""The configuration of a run: every key, its default, its unit, and its check.

The sections `model` and `data` are in `surm_jax.tasks.config`. The files in `configs/` start from `base_config()` and
change what they need; every key can be overridden on the command line (`--config.optim.steps=100`).
`surm_jax.training.parsing` turns a configuration into these frozen dataclasses, once; nothing else reads it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from surm_jax.errors import UserError, require_one_of
from surm_jax.paths import compile_pattern
from surm_jax.peft import METHODS, Method, make_method
from surm_jax.peft.parts.base import SLOTS
from surm_jax.structured import EXECUTIONS
from surm_jax.tasks.config import DataConfig, ModelConfig, check_at_least, check_fraction

DECAYS = ("cosine", "linear", "constant")
ADAPTER = f"(.*/)?({'|'.join(SLOTS)})/"
"""How the path of an adapter's parameter begins, as a regular expression."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """A method for some modules: `{"target": r"blocks/0/.*", "method": "lora", "settings": {"rank": 4}}`."""

    # Which modules: a preset of the model, such as "qkv", or a regular expression for whole module paths.
    target: str
    # An update or a branch, such as "lora" or "bottleneck". Empty: these modules get nothing.
    method: str = ""
    # Settings of the method that differ from its defaults.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # For updates of packed kernels, such as one kernel for query, key and value: the number of equal parts of the
    # output features, and the numbers of the parts to update, from 0. Empty: all parts.
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

    # The method, such as "circulant", "lora", "linear_probe" or "full". docs/methods.md lists all with their settings.
    method: str = "circulant"
    # Which modules get the method: a preset of the model, such as "qkv", "qv" or "mlp", or a regular expression for
    # whole module paths. Empty: the preset that the method is meant for. "none": only the modules that `rules` names.
    target: str = ""
    # Methods for some modules, see `RuleConfig`. A module gets the method of the first rule that matches its path; the
    # rule of `method` and `target` comes last.
    rules: tuple[RuleConfig, ...] = ()
    # How the product with an update is computed: "fft", "dense" (as a dense matrix), "fused" (added to the kernel
    # first, in float32 only), or "auto" (the fastest by measurement). Results are the same up to rounding.
    execution: str = "auto"
    # Parameters of the model that are trained themselves, with every method: regular expressions for whole paths.
    train: tuple[str, ...] = ("head/.*",)
    methods: Mapping[str, Method] = dataclasses.field(
        default_factory=lambda: {name: cls() for name, cls in METHODS.items()}
    )

    def __post_init__(self):
        require_one_of("config.peft.method", self.method, METHODS)
        require_one_of("config.peft.execution", self.execution, EXECUTIONS)
        for pattern in (self.target, *self.train):
            compile_pattern(pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """The optimiser's settings for some of the trained parameters."""

    # Which parameters: a regular expression for whole paths.
    pattern: str
    # Peak learning rate. 0: that of the method, from optim.learning_rate.
    learning_rate: float = 0.0
    # Decoupled weight decay; each update subtracts learning rate times weight decay times the parameter.
    weight_decay: float = 0.0

    def __post_init__(self):
        compile_pattern(self.pattern)
        check_at_least("optim.groups.*.learning_rate", self.learning_rate, 0)
        check_at_least("optim.groups.*.weight_decay", self.weight_decay, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """Groups of trained parameters. A parameter belongs to the first group whose pattern matches its path."""

    adapter: GroupConfig = GroupConfig(pattern=f"{ADAPTER}.*")
    head: GroupConfig = GroupConfig(pattern=r"head/.*")
    norm: GroupConfig = GroupConfig(pattern=r"(.*[/_])?norm\d*/.*")
    bias: GroupConfig = GroupConfig(pattern=r".*/bias")
    rest: GroupConfig = GroupConfig(pattern=r".*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, AdamW (Adam where the weight decay is 0), its schedule, and the loss."""

    # Number of updates, if `epochs` is 0.
    steps: int = 1000
    # Number of passes over the training set, rounded up to whole updates. 0: make `steps` updates.
    epochs: float = 0.0
    # Peak learning rate of each method, since methods differ: --config.optim.learning_rate.lora=0.01.
    learning_rate: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {name: method.learning_rate for name, method in METHODS.items()}
    )
    # Settings for groups of parameters: --config.optim.groups.head.weight_decay=0.1.
    groups: GroupsConfig = GroupsConfig()
    # Share of the updates, in [0, 1), in which the learning rate rises linearly from 0 to its peak.
    warmup_ratio: float = 0.0
    # How the learning rate falls from its peak to 0 afterwards: "cosine", "linear", or "constant" (it does not fall).
    decay: str = "cosine"
    # Largest global norm of the gradient; a longer gradient is scaled down to it. 0: no clipping.
    clip_norm: float = 1.0
    # Number of micro-batches per update. The batch is worked on in this many parts, one after the other, which takes
    # less memory and gives the same update.
    accumulate: int = 1
    # Share of a label's mass that is spread evenly over all classes, in [0, 1).
    label_smoothing: float = 0.0

    def __post_init__(self):
        require_one_of("config.optim.decay", self.decay, DECAYS)
        check_at_least("optim.steps", self.steps, 1)
        check_at_least("optim.accumulate", self.accumulate, 1)
        check_at_least("optim.clip_norm", self.clip_norm, 0)
        check_at_least("optim.epochs", self.epochs, 0)
        for method, rate in self.learning_rate.items():
            check_at_least(f"optim.learning_rate.{method}", rate, 0)
        check_fraction("optim.warmup_ratio", self.warmup_ratio)
        check_fraction("optim.label_smoothing", self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often a run logs, evaluates and saves, in steps. The last step always does; 0: only the last step does."""

    # Write the training loss, the gradient norm, the learning rates and the speed.
    metrics_every: int = 50
    # Evaluate the held-out examples, or the test set if `data.holdout` is 0; save a checkpoint as well.
    evaluate_every: int = 0
    # Save a checkpoint, from which an interrupted run goes on.
    checkpoint_every: int = 500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_at_least(f"log.{field.name}", getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are used."""

    # Number of devices over which the batch is split. 0: all devices, divided by `fsdp`.
    data: int = 0
    # Number of devices over which both the batch and the large arrays of the frozen base are split. A device then holds
    # only its share of the base, at the price of gathering each block where it is used.
    fsdp: int = 1

    def __post_init__(self):
        check_at_least("mesh.data", self.data, 0)
        check_at_least("mesh.fsdp", self.fsdp, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    # One run for each seed. Several seeds get a folder each, and the result has mean and standard deviation. On the
    # command line: --config.seeds="(0,1,2)".
    seeds: tuple[int, ...] = (0,)
    # Python modules that are imported first. They register methods, matrix families, models or tasks of your own, which
    # every mode of the run then knows by name: --config.plugins="('my_family',)" --config.peft.method=mine.
    plugins: tuple[str, ...] = ()
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
    """Return the configuration with the number of steps that its epochs over a number of examples take.

    >>> config = dataclasses.replace(RunConfig(), optim=OptimConfig(epochs=1.5))
    >>> with_steps(config, examples=100).optim.steps
    3
    """
    if not config.optim.epochs:
        return config
    steps = math.ceil(config.optim.epochs * examples / config.data.batch_size)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps))
