"""The optimiser of the trained arrays: AdamW for each group of paths, with one schedule and one clipping for all."""

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
    """Return the schedule by which every peak learning rate is multiplied: linear warm-up from 0 to 1, then the decay.

    >>> import dataclasses
    >>> rate = schedule(dataclasses.replace(OptimConfig(), steps=10, warmup_ratio=0.2, decay="linear"))
    >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    # Rounding could turn all steps into warm-up: leave at least the last step at the peak.
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
    """Return the group of each path: the first group whose pattern matches the whole path.

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
    """Return the peak learning rate of every group that has at least one of the paths.

    >>> learning_rates(OptimConfig(learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    {'head': 0.02}

    Raises:
        UserError: A group with its own learning rate has none of the paths, or a path matches no pattern.
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
    """The learning rate of every group at every step: its peak times the value of the schedule.

    Learning rates are arguments of the compiled step, so that one program serves all rates and schedules.

    >>> rates = Rates(OptimConfig(steps=4, decay="linear", learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    >>> [f"{rates.before(step)['head']:.3f}" for step in (1, 2, 3, 4)]
    ['0.020', '0.015', '0.010', '0.005']

    Args:
        config: The schedule, and the peak learning rates of methods and groups.
        method: The method whose learning rate applies to groups without one of their own.
        paths: Paths of the trained parameters. A group without any of them has no rate.
    """

    def __init__(self, config: OptimConfig, method: str, paths: Iterable[str]):
        self._peaks = learning_rates(config, method, paths)
        self._factors = np.asarray(jax.vmap(schedule(config))(jnp.arange(config.steps, dtype=jnp.float32)), np.float32)

    def before(self, step: int) -> dict[str, np.float32]:
        """Return the learning rates of the update that makes a step. The first step is 1."""
        return {group: np.float32(peak) * self._factors[step - 1] for group, peak in self._peaks.items()}


def make_optimizer(config: OptimConfig, paths: Iterable[str]) -> optax.GradientTransformationExtraArgs:
    """Build the optimiser of the trained arrays. Its `update` has the extra argument `rates`, from `Rates.before`.

    Args:
        config: Defines the groups and the clipping.
        paths: Paths of the trained arrays: the keys of the dictionary that the optimiser updates.
    """
    groups = groups_of(paths, config.groups)

    def adamw(group: str) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(getattr(config.groups, group).weight_decay)
        return optax.chain(optax.scale_by_adam(), decay, _scale_by_rate(group))

    optimizer = optax.partition({group: adamw(group) for group in dict.fromkeys(groups.values())}, groups)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **rates: Any):
        # optax raises a Python float to the power of an integer step, which strict dtype promotion forbids.
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
