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
    """Return the factor on every peak learning rate by step: linear warm-up from 0 to 1, then decay to 0.

    >>> import dataclasses
    >>> rate = schedule(dataclasses.replace(OptimConfig(), steps=10, warmup_ratio=0.2, decay="linear"))
    >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    # Rounding may make all steps warm-up; the last step is kept for the peak.
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
    """Return the group of each path: the first whose pattern matches the whole path.

    >>> groups_of(["blocks/0/attention/query/delta/r1", "head/bias", "norm/scale"], GroupsConfig())
    {'blocks/0/attention/query/delta/r1': 'adapter', 'head/bias': 'head', 'norm/scale': 'norm'}

    Raises:
        UserError: No pattern matches a path.
    """
    patterns = {name: compile_pattern(group.pattern) for name, group in vars(groups).items()}
    labels: dict[str, str] = {}
    for path in paths:
        label = next((name for name, pattern in patterns.items() if pattern.matches(path)), None)
        if label is None:
            raise UserError(
                f"no pattern of config.optim.groups matches {path}: the last group, rest, should take all (.*)"
            )
        labels[path] = label
    return labels


def learning_rates(config: OptimConfig, method: str, paths: Iterable[str]) -> dict[str, float]:
    """Return the peak learning rate of every group that has one of these paths.

    >>> learning_rates(OptimConfig(learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    {'head': 0.02}

    Raises:
        UserError: A group with its own learning rate has none of the paths, or no pattern matches a path.
    """
    groups = groups_of(paths, config.groups)
    taken = set(groups.values())
    for name, group in vars(config.groups).items():
        if group.learning_rate and name not in taken:
            trained = ", ".join(sorted(groups)[:4]) + ", ..." * (len(groups) > 4)
            raise UserError(
                f"config.optim.groups.{name} has learning_rate={group.learning_rate:g}, but no parameter:"
                f" {group.pattern} matches none that is trained ({trained}), or groups before it take them"
            )
    return {
        name: group.learning_rate or config.learning_rate[method]
        for name, group in vars(config.groups).items()
        if name in taken
    }


class Rates:
    """The learning rate of every group at every step: its peak times the factor of the schedule.

    Rates are arguments of the compiled step, so that one program serves every rate and schedule.

    >>> rates = Rates(OptimConfig(steps=4, decay="linear", learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    >>> [f"{rates.before(step)['head']:.3f}" for step in (1, 2, 3, 4)]
    ['0.020', '0.015', '0.010', '0.005']

    Args:
        config: The schedule, and the peaks by method or group.
        method: The method whose learning rate is used by groups without their own.
        paths: Paths of the trained parameters. Groups without any of them have no rate.
    """

    def __init__(self, config: OptimConfig, method: str, paths: Iterable[str]):
        self._peaks = learning_rates(config, method, paths)
        self._factors = np.asarray(jax.vmap(schedule(config))(jnp.arange(config.steps, dtype=jnp.float32)), np.float32)

    def before(self, step: int) -> dict[str, np.float32]:
        """Return the rates of the update that leads to a step, counted from 1."""
        return {group: np.float32(peak) * self._factors[step - 1] for group, peak in self._peaks.items()}


def make_optimizer(config: OptimConfig, paths: Iterable[str]) -> optax.GradientTransformationExtraArgs:
    """Build the optimiser of the trained arrays. Its `update` has the extra argument `rates`, from `Rates.before`.

    Args:
        config: Groups and clipping.
        paths: Keys of the dictionary of arrays that it will update.
    """
    groups = groups_of(paths, config.groups)

    def adamw(group: str) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(getattr(config.groups, group).weight_decay)
        return optax.chain(optax.scale_by_adam(), decay, _scale_by_rate(group))

    optimizer = optax.partition({group: adamw(group) for group in dict.fromkeys(groups.values())}, groups)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **rates: Any):
        # optax raises a Python float to the power of an integer step, which strict promotion refuses.
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
