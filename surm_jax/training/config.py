"""The configuration of a run: every key, what it means, its default, its unit, and the check of its value.

The keys of `config.model` and `config.data` are documented in `surm_jax/tasks/config.py`, all other keys here. A file
in `configs/` starts from `base_config()`, which holds these defaults, and changes some of them. On the command line,
`--config.optim.steps=100` overrides the key `steps` of `OptimConfig`.

`surm_jax.training.parsing` checks a configuration once and turns it into these frozen dataclasses. All other code
reads only the dataclasses.
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
"""A regular expression for the beginning of the path of an adapter's parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """A method for some of the modules: `{"target": r"blocks/0/.*", "method": "lora", "settings": {"rank": 4}}`."""

    # The modules to adapt: a preset of the model, such as "qkv", or a regular expression that matches whole module
    # paths.
    target: str
    # The method that these modules get, such as "lora" or "bottleneck". Empty: they get none.
    method: str = ""
    # Settings of the method by name. Settings that are not given have the defaults of the method.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # For packed kernels, such as one kernel that computes query, key and value: the number of equal parts into which
    # the output features are divided. Each part gets an update of its own.
    parts: int = 1
    # The parts to update, counted from 0. Empty: all parts.
    which: tuple[int, ...] = ()

    def __post_init__(self):
        if self.method:
            require_one_of("config.peft.rules.*.method", self.method, METHODS)
            make_method(self.method, dict(self.settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Which layers are adapted, and with which method.

    `methods` holds the settings of every method by the name of the method. The configuration has no key `methods`: the
    settings of a method are a section of `config.peft`, as in `--config.peft.lora.rank=4`.
    """

    # The method, such as "circulant", "lora", "linear_probe" or "full". docs/methods.md lists all methods and their
    # settings.
    method: str = "circulant"
    # The modules to adapt: a preset of the model, such as "qkv", "qv" or "mlp", or a regular expression that matches
    # whole module paths. Empty: the default target of the method. "none": adapt only the modules that `rules` targets.
    target: str = ""
    # Other methods for some modules; see `RuleConfig`. A module gets the method of the first rule that matches its
    # path. `method` and `target` are the last rule.
    rules: tuple[RuleConfig, ...] = ()
    # How an adapted layer computes its product. Results are the same up to rounding.
    #   "fft"    adds the fast product with the update to the product with the kernel;
    #   "dense"  forms the dense matrix of the update, and computes its gradient through that matrix;
    #   "fused"  adds the dense update to the kernel, but computes the gradient by fast products (float32 only);
    #   "auto"   takes the one that was fastest when a similar case was measured.
    execution: str = "auto"
    # Parameters of the model to train directly, whatever the method: regular expressions that match whole paths.
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
    """The optimiser's settings for one group of trained parameters."""

    # The parameters of the group: a regular expression that matches whole parameter paths.
    pattern: str
    # Peak learning rate of the group. 0: the learning rate of the method, from optim.learning_rate.
    learning_rate: float = 0.0
    # Decoupled weight decay: each update also subtracts learning rate * weight decay * parameter.
    weight_decay: float = 0.0

    def __post_init__(self):
        compile_pattern(self.pattern)
        check_at_least("optim.groups.*.learning_rate", self.learning_rate, 0)
        check_at_least("optim.groups.*.weight_decay", self.weight_decay, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """The groups of trained parameters. A parameter belongs to the first of these groups that matches its path."""

    adapter: GroupConfig = GroupConfig(pattern=f"{ADAPTER}.*")
    head: GroupConfig = GroupConfig(pattern=r"head/.*")
    norm: GroupConfig = GroupConfig(pattern=r"(.*[/_])?norm\d*/.*")
    bias: GroupConfig = GroupConfig(pattern=r".*/bias")
    rest: GroupConfig = GroupConfig(pattern=r".*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser AdamW, its learning rate schedule, and the loss. With weight decay 0, AdamW is Adam."""

    # Number of updates. It counts only if `epochs` is 0.
    steps: int = 1000
    # Number of passes over the training set; may be a fraction, and is rounded up to whole updates. 0: make `steps`
    # updates.
    epochs: float = 0.0
    # Peak learning rate for each method: --config.optim.learning_rate.lora=0.01. The run uses that of `peft.method`.
    learning_rate: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {name: method.learning_rate for name, method in METHODS.items()}
    )
    # Settings for each group of parameters: --config.optim.groups.head.weight_decay=0.1.
    groups: GroupsConfig = GroupsConfig()
    # Fraction of all updates, in [0, 1), for warm-up: the learning rate rises linearly from 0 to its peak.
    warmup_ratio: float = 0.0
    # How the learning rate falls to 0 after the warm-up: "cosine", "linear", or "constant" (it stays at its peak).
    decay: str = "cosine"
    # Gradient clipping: a gradient whose global norm is larger is scaled down to this norm. 0: no clipping.
    clip_norm: float = 1.0
    # Gradient accumulation: the number of micro-batches per update. The batch is split into this many equal parts,
    # which are computed one after the other. More parts take less memory. Without dropout the update is the same, up to
    # rounding.
    accumulate: int = 1
    # Label smoothing, in [0, 1): the fraction of the probability of each label that is spread evenly over all classes.
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
    """How often a run logs, evaluates and saves, in steps.

    Each of these is always done at the last step. 0 means: only at the last step.
    """

    # Steps between two log entries: training loss, gradient norm, learning rates and speed.
    metrics_every: int = 50
    # Steps between two evaluations of the held-out examples, or of the test set if `data.holdout` is 0. Each evaluation
    # is followed by a checkpoint.
    evaluate_every: int = 0
    # Steps between two checkpoints. An interrupted run resumes from the last one.
    checkpoint_every: int = 500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_at_least(f"log.{field.name}", getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The mesh of devices: `data` times `fsdp` of them."""

    # Size of the axis that splits only the batch. 0: the number of all devices divided by `fsdp`.
    data: int = 0
    # Size of the axis that splits the batch and also the large arrays of the frozen base (fully sharded data
    # parallelism). Each device then holds only its part of the base. The price is communication: each block is gathered
    # where it is used.
    fsdp: int = 1

    def __post_init__(self):
        check_at_least("mesh.data", self.data, 0)
        check_at_least("mesh.fsdp", self.fsdp, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run."""

    # The seeds. The run is made once with each. Several seeds have a folder each, and the result holds the mean and the
    # standard deviation of every metric. On the command line: --config.seeds="(0,1,2)".
    seeds: tuple[int, ...] = (0,)
    # Python modules of your own to import before anything else. Importing them registers your methods, matrix families,
    # models or tasks, so that the configuration can name them:
    # --config.plugins="('my_method',)" --config.peft.method=mine. docs/extending.md shows how to write them.
    plugins: tuple[str, ...] = ()
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    peft: PeftConfig = dataclasses.field(default_factory=PeftConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"config.seeds must hold one or more different numbers >= 0, got {self.seeds}")
        if self.data.batch_size % self.optim.accumulate:
            raise UserError(
                f"config.data.batch_size={self.data.batch_size} does not divide into"
                f" config.optim.accumulate={self.optim.accumulate} equal micro-batches"
            )
        if self.peft.execution == "fused" and self.model.dtype != "float32":
            raise UserError(
                f"config.peft.execution=fused adds updates to the kernels, but config.model.dtype={self.model.dtype}"
                " would round small updates away: choose auto, fft or dense"
            )
        if self.peft.method not in self.optim.learning_rate:
            raise UserError(f"config.optim.learning_rate has no value for config.peft.method={self.peft.method}")


def with_steps(config: RunConfig, examples: int) -> RunConfig:
    """Return the configuration with `optim.steps` computed from `optim.epochs` and the number of training examples.

    If `optim.epochs` is 0, the configuration is returned as it is.

    >>> config = dataclasses.replace(RunConfig(), optim=OptimConfig(epochs=1.5))
    >>> with_steps(config, examples=100).optim.steps
    3
    """
    if not config.optim.epochs:
        return config
    steps = math.ceil(config.optim.epochs * examples / config.data.batch_size)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps))
