"""The optimiser over the trained arrays: AdamW by groups of paths, with one schedule and one clipping for all."""

from collections.abc import Iterable

import jax
import optax

from surm_jax.errors import UserError
from surm_jax.paths import compile_pattern
from surm_jax.training.config import GroupsConfig, OptimConfig


def schedule(config: OptimConfig) -> optax.Schedule:
    """Returns the factor on every peak learning rate by step: linear warm-up from 0 to 1, then decay to 0.

    >>> import dataclasses
    >>> rate = schedule(dataclasses.replace(OptimConfig(), steps=10, warmup_steps=2, decay="linear"))
    >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    steps = config.steps - config.warmup_steps
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(1.0, steps),
        "linear": lambda: optax.linear_schedule(1.0, 0.0, steps),
        "constant": lambda: optax.constant_schedule(1.0),
    }[config.decay]()
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def groups_of(paths: Iterable[str], groups: GroupsConfig) -> dict[str, str]:
    """Returns the name of each path's group: the first whose pattern matches it as a whole.

    >>> groups_of(["blocks/0/attention/query/delta/r1", "head/bias", "norm/scale"], GroupsConfig())
    {'blocks/0/attention/query/delta/r1': 'adapter', 'head/bias': 'head', 'norm/scale': 'norm'}

    Raises:
      UserError: if no pattern matches a path.
    """
    patterns = {name: compile_pattern(group.pattern) for name, group in vars(groups).items()}
    labels = {}
    for path in paths:
        labels[path] = next((name for name, pattern in patterns.items() if pattern.fullmatch(path)), None)
        if labels[path] is None:
            raise UserError(
                f"no pattern of config.optim.groups matches {path}: the last group, rest, should take all (.*)"
            )
    return labels


def learning_rates(config: OptimConfig, method: str, paths: Iterable[str]) -> dict[str, float]:
    """Returns the peak learning rate of every group that takes one of these paths.

    >>> learning_rates(OptimConfig(learning_rate={"lora": 0.02}), "lora", ["head/bias"])
    {'head': 0.02}
    """
    taken = set(groups_of(paths, config.groups).values())
    return {
        name: group.learning_rate or config.learning_rate[method]
        for name, group in vars(config.groups).items()
        if name in taken
    }


def make_optimizer(config: OptimConfig, method: str, paths: Iterable[str]) -> optax.GradientTransformation:
    """Builds the optimiser for the trained arrays with these paths.

    Args:
      config: groups, schedule, clipping.
      method: whose learning rate holds for the groups without one of their own.
      paths: the keys of the dictionary of arrays that it will update.
    """
    factor = schedule(config)

    def adamw(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(lambda step: learning_rate * factor(step), weight_decay=weight_decay)

    paths = list(paths)
    transforms = {
        name: adamw(rate, getattr(config.groups, name).weight_decay)
        for name, rate in learning_rates(config, method, paths).items()
    }
    optimizer = optax.partition(transforms, groups_of(paths, config.groups))
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)

    def update(gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        # optax raises a Python float to an integer step, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradients, state, params)

    return optax.GradientTransformation(optimizer.init, update)
