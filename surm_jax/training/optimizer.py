"""The optimiser of a run, and its learning rate schedule.

Patterns in `config.optim.groups` divide the trained arrays into groups by their paths. Each group has its own AdamW,
with a learning rate and a weight decay of its own. All groups share one schedule. The gradient is clipped by its global
norm, over the arrays of all groups.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from surm_jax.errors import UserError
from surm_jax.paths import compile_pattern
from surm_jax.training.config import GroupsConfig, OptimConfig


def schedule(config: OptimConfig) -> optax.Schedule:
    """Return the learning rate schedule, a function from the number of updates already made to a factor in [0, 1].

    The learning rate of an update is the peak learning rate times this factor. The factor rises linearly from 0 to 1
    during warm-up, and then follows `config.decay`. Here, two steps of warm-up are followed by eight of linear decay:

    >>> import dataclasses
    >>> rate = schedule(dataclasses.replace(OptimConfig(), steps=10, warmup_ratio=0.2, decay="linear"))
    >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    # Rounding could make all steps warm-up steps. Always leave at least one step after the warm-up.
    warmup_steps = min(round(config.warmup_ratio * config.steps), config.steps - 1)
    steps = config.steps - warmup_steps
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(1.0, steps),
        "linear": lambda: optax.linear_schedule(1.0, 0.0, steps),
        "constant": lambda: optax.constant_schedule(1.0),
    }[config.decay]()
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup_steps), after], [warmup_steps])


def groups_of(paths: Iterable[str], groups: GroupsConfig) -> dict[str, str]:
    """Return the name of the optimiser group of each parameter, by the path of the parameter.

    A parameter belongs to the first group whose pattern matches its whole path.

    >>> groups_of(["blocks/0/attention/query/delta/r1", "head/bias", "norm/scale"], GroupsConfig())
    {'blocks/0/attention/query/delta/r1': 'adapter', 'head/bias': 'head', 'norm/scale': 'norm'}

    Raises:
        UserError: A path matches no pattern.
    """
    patterns = {name: compile_pattern(group.pattern) for name, group in vars(groups).items()}
    labels: dict[str, str] = {}
    for path in paths:
        label = next((name for name, pattern in patterns.items() if pattern.matches(path)), None)
        if label is None:
            raise UserError(
                f"no pattern of config.optim.groups matches {path}: that of the last"
                " group, rest, should match all paths (.*)"
            )
        labels[path] = label
    return labels


def learning_rates(config: OptimConfig, method: str, paths: Iterable[str]) -> dict[str, float]:
    """Return the peak learning rate of every optimiser group to which at least one parameter belongs.

    It is the group's own learning rate if there is one, otherwise that of the method. In the example, the only
    parameter belongs to the group `head`, which has no learning rate of its own:

    >>> learning_rates(OptimConfig(learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    {'head': 0.02}

    Args:
        config: The learning rates of methods and groups, and the patterns of the groups.
        method: The name of the method.
        paths: The paths of the trained parameters.

    Raises:
        UserError: A group with a learning rate of its own has no parameters, or a path matches no pattern.
    """
    groups = groups_of(paths, config.groups)
    taken = set(groups.values())
    for name, group in vars(config.groups).items():
        if group.learning_rate and name not in taken:
            trained = ", ".join(sorted(groups)[:4]) + ", ..." * (len(groups) > 4)
            raise UserError(
                f"config.optim.groups.{name} has learning_rate={group.learning_rate:g}, but no parameter:"
                f" {group.pattern} matches no parameter that is trained ({trained}), or earlier groups match them first"
            )
    return {
        name: group.learning_rate or config.learning_rate[method]
        for name, group in vars(config.groups).items()
        if name in taken
    }


class Rates:
    """The learning rate of every optimiser group at every step: the peak learning rate times the schedule's factor.

    The training step takes the learning rates as arguments. Thus it need not be compiled again for other learning
    rates or another schedule. In the example, the learning rate falls linearly from its peak 0.02 during 4 steps:

    >>> rates = Rates(OptimConfig(steps=4, decay="linear", learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    >>> [f"{rates.before(step)['head']:.3f}" for step in (1, 2, 3, 4)]
    ['0.020', '0.015', '0.010', '0.005']

    Args:
        config: The schedule, and the peak learning rates of methods and groups.
        method: The method whose learning rate applies to groups without a learning rate of their own.
        paths: The paths of the trained parameters. A group to which none of them belongs gets no learning rate.
    """

    def __init__(self, config: OptimConfig, method: str, paths: Iterable[str]):
        self._peaks = learning_rates(config, method, paths)
        self._factors = np.asarray(jax.vmap(schedule(config))(jnp.arange(config.steps, dtype=jnp.float32)), np.float32)

    def before(self, step: int) -> dict[str, np.float32]:
        """Return the learning rate of every group for one update. The first update is step 1."""
        return {group: np.float32(peak) * self._factors[step - 1] for group, peak in self._peaks.items()}


def make_optimizer(config: OptimConfig, paths: Iterable[str]) -> optax.GradientTransformationExtraArgs:
    """Build the optimiser, which clips the gradient by its global norm and then applies a separate AdamW to each group.

    The method `update` of the optimiser needs the extra keyword argument `rates`, which is a result of `Rates.before`.

    Args:
        config: The patterns and the weight decay of the groups, and the largest allowed norm of the gradient.
        paths: The paths of the trained arrays. The gradients are a dictionary with these keys.
    """
    groups = groups_of(paths, config.groups)

    def adamw(group: str) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(getattr(config.groups, group).weight_decay)
        return optax.chain(optax.scale_by_adam(), decay, _scale_by_rate(group))

    optimizer = optax.partition({group: adamw(group) for group in dict.fromkeys(groups.values())}, groups)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **rates: Any):
        # Users may forbid implicit dtype promotion (`jax_numpy_dtype_promotion="strict"`). Allow it here: optax raises
        # a Python float to the power of an int32 step.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params, **rates)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _scale_by_rate(group: str) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        rates: Mapping[str, jax.Array],
        **_: Any,
    ):
        return jax.tree.map(lambda leaf: -rates[group] * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
