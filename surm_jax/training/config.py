"""The configuration of a run: what every key means, its default, its unit and its allowed values.

The keys of `config.model` and `config.data` are in `surm_jax/tasks/config.py`, all others here. A file in `configs/`
starts from `base_config()`, which holds these defaults, and changes some of them. On the command line,
`--config.optim.steps=100` overrides the key `steps` of `OptimConfig`.

`surm_jax.training.parsing` checks a configuration and turns it into these frozen dataclasses, which all other code
reads.
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
"""A regular expression for the beginning of a parameter path. It matches the parameters that belong to an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """One rule of `config.peft.rules`, which chooses the method for the modules that a preset or a pattern selects.

    In a configuration file it is a dictionary, such as
    `{"target": r"blocks/0/.*", "method": "lora", "settings": {"rank": 4}}`.
    """

    # The modules to adapt: a preset of the model, such as "qkv", or a regular expression that matches whole module
    # paths.
    target: str
    # The method that these modules get, such as "lora" or "bottleneck". Empty: these modules are not adapted.
    method: str = ""
    # Settings of the method, by their names. Settings that are missing here have the defaults of the method.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The number of equal parts into which the output features of a packed kernel are divided, such as 3 for one kernel
    # that computes query, key and value. Each part gets an update of its own.
    parts: int = 1
    # The indices of the parts to update, counted from 0. Empty: all parts.
    which: tuple[int, ...] = ()

    def __post_init__(self):
        if self.method:
            require_one_of("config.peft.rules.*.method", self.method, METHODS)
            make_method(self.method, dict(self.settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The section `config.peft`: which layers are adapted, and with which method.

    The field `methods` holds the settings of every method, by its name. In a configuration these settings are sections
    of `config.peft`, as in `--config.peft.lora.rank=4`.
    """

    # The method, such as "circulant", "lora", "linear_probe" or "full". docs/methods.md lists all methods and their
    # settings.
    method: str = "circulant"
    # The modules to adapt: a preset of the model, such as "qkv", "qv" or "mlp", or a regular expression that matches
    # whole module paths. Empty: the default target of the method. "none": adapt only the modules that `rules` targets.
    target: str = ""
    # Rules that give other methods to some modules (`RuleConfig`). A module gets the method of the first rule that
    # matches its path. `method` and `target` above act as one more rule after all of these.
    rules: tuple[RuleConfig, ...] = ()
    # How an adapted linear layer multiplies its input x by the frozen kernel plus the structured update. The results
    # are the same up to rounding.
    #   "fft"    computes x @ kernel and a fast product of x and the update, such as an FFT, and adds the two;
    #   "dense"  forms the dense matrix of the update, and computes the update's gradient through that matrix;
    #   "fused"  adds the dense matrix of the update to the kernel and computes one product, but computes the update's
    #            gradient with fast products (float32 only);
    #   "auto"   chooses the one that was fastest when a similar case was measured.
    execution: str = "auto"
    # Regular expressions for parameters of the base model. Each must match a whole parameter path. With every method,
    # the matching parameters are trained directly.
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
    """A section of `config.optim.groups`: the optimiser's settings for one group of trained parameters."""

    # A regular expression for the parameters of the group. It must match the whole path of a parameter.
    pattern: str
    # Peak learning rate of the group. 0: use the learning rate of the method, from `optim.learning_rate`.
    learning_rate: float = 0.0
    # Coefficient of decoupled weight decay: each update also subtracts learning_rate * weight_decay * parameter.
    weight_decay: float = 0.0

    def __post_init__(self):
        compile_pattern(self.pattern)
        check_at_least("optim.groups.*.learning_rate", self.learning_rate, 0)
        check_at_least("optim.groups.*.weight_decay", self.weight_decay, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """The section `config.optim.groups`: the groups into which the optimiser divides the trained parameters.

    A parameter belongs to the first group, in the order of these fields, whose pattern matches its path.
    """

    adapter: GroupConfig = GroupConfig(pattern=f"{ADAPTER}.*")
    head: GroupConfig = GroupConfig(pattern=r"head/.*")
    norm: GroupConfig = GroupConfig(pattern=r"(.*[/_])?norm\d*/.*")
    bias: GroupConfig = GroupConfig(pattern=r".*/bias")
    rest: GroupConfig = GroupConfig(pattern=r".*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The section `config.optim`: the optimiser AdamW, its learning rate schedule, and label smoothing in the loss.

    With weight decay 0, which is the default, AdamW is the same as Adam.
    """

    # Number of updates of the trained parameters. It has an effect only if `epochs` is 0.
    steps: int = 1000
    # Number of passes over the training set, which may be a fraction. The number of updates is computed from it and
    # rounded up. 0: make `steps` updates.
    epochs: float = 0.0
    # Peak learning rate for each method, as in --config.optim.learning_rate.lora=0.01. A run uses the one of
    # `peft.method`.
    learning_rate: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {name: method.learning_rate for name, method in METHODS.items()}
    )
    # Settings for each group of parameters, as in --config.optim.groups.head.weight_decay=0.1.
    groups: GroupsConfig = GroupsConfig()
    # Fraction of all updates that is used for warm-up, in [0, 1). During warm-up, the learning rate rises linearly from
    # 0 to its peak.
    warmup_ratio: float = 0.0
    # What the learning rate does after the warm-up: it falls to 0 ("cosine" or "linear"), or stays at its peak
    # ("constant").
    decay: str = "cosine"
    # Largest global norm of the gradient. A larger gradient is scaled down to this norm. 0: no clipping.
    clip_norm: float = 1.0
    # Number of micro-batches per update, for gradient accumulation. The batch is split into this many equal parts.
    # Their gradients are computed sequentially and averaged. More parts take less memory. Without dropout, the update
    # does not depend on the number of parts, up to rounding.
    accumulate: int = 1
    # Label smoothing: the fraction of each label's probability that is spread evenly over all classes, in [0, 1).
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
    """The section `config.log`: how often a run logs metrics, evaluates the model and saves a checkpoint.

    The values are numbers of steps. A run does each of the three also at its last step, and with 0 only then.
    """

    # Number of steps from one log entry to the next. An entry holds the training loss, the training accuracy (only for
    # classification), the gradient norm, the learning rates and the speed.
    metrics_every: int = 50
    # Number of steps from one evaluation to the next. It evaluates the held-out examples, or the test set if
    # `data.holdout` is 0. A checkpoint is saved after every evaluation.
    evaluate_every: int = 0
    # Number of steps from one checkpoint to the next. An interrupted run resumes from its last checkpoint.
    checkpoint_every: int = 500

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_at_least(f"log.{field.name}", getattr(self, field.name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The section `config.mesh`: the JAX device mesh, which has the axes `data` and `fsdp`.

    A run uses `data` times `fsdp` devices.
    """

    # Number of devices along the axis `data`, which splits only the batch. 0: the number of all devices divided by
    # `fsdp`.
    data: int = 0
    # Number of devices along the axis `fsdp`, which splits the batch and also the large arrays of the frozen base model
    # (fully sharded data parallelism). Each device then stores only its part of these arrays. The price is
    # communication, because the weights of each block are gathered whenever they are used.
    fsdp: int = 1

    def __post_init__(self):
        check_at_least("mesh.data", self.data, 0)
        check_at_least("mesh.fsdp", self.fsdp, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run, with one field for each section."""

    # The random seeds. The model is trained once with each seed. With several seeds, each seed has its own folder, and
    # the result holds the mean and the standard deviation of every metric. Example on the command line:
    # --config.seeds="(0,1,2)".
    seeds: tuple[int, ...] = (0,)
    # Names of your own Python modules, which are imported before the configuration is checked. When a module is
    # imported, it registers your methods, matrix families, models or tasks, so that the configuration can name them:
    # --config.plugins="('my_method',)" --config.peft.method=mine. docs/extending.md shows how to write such a module.
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
    """Return the configuration with `optim.steps` computed from `optim.epochs`, unless that is 0.

    The number of steps is `epochs * examples / data.batch_size`, rounded up, where `examples` is the number of training
    examples. With the default batch size of 64, 1.5 passes over 100 examples are 150 / 64 = 2.3 batches, thus 3 steps:

    >>> config = dataclasses.replace(RunConfig(), optim=OptimConfig(epochs=1.5))
    >>> with_steps(config, examples=100).optim.steps
    3
    """
    if not config.optim.epochs:
        return config
    steps = math.ceil(config.optim.epochs * examples / config.data.batch_size)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps))
