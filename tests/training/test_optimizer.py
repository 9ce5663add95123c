import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.training.config import GroupConfig, GroupsConfig, OptimConfig
from surm_jax.training.optimizer import Rates, groups_of, make_optimizer, schedule

RATES = {"circulant": 1e-2, "lora": 2e-2, "linear_probe": 3e-2, "full": 4e-2}


def factor(config: OptimConfig, step: int) -> float:
    """Return the factor of the learning rate after `step` updates, computed without optax."""
    warmup = round(config.warmup_ratio * config.steps)
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (config.steps - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.decay]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 19])
def test_schedule_is_its_definition_at_every_step(decay, warmup):
    config = OptimConfig(steps=20, warmup_ratio=warmup / 20, decay=decay)
    values = [float(schedule(config)(step)) for step in range(21)]
    np.testing.assert_allclose(values, [factor(config, step) for step in range(21)], atol=1e-6)
    assert values[0] == (0 if warmup else 1)
    assert values[warmup] == 1


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "ratio"), [(10, 0.95), (1, 0.6)])
def test_warm_up_leaves_the_last_step_at_the_peak(decay, steps, ratio):
    rate = schedule(OptimConfig(steps=steps, warmup_ratio=ratio, decay=decay))
    expected = [step / max(1, steps - 1) for step in range(steps - 1)] + [1]
    np.testing.assert_allclose([float(rate(step)) for step in range(steps)], expected, rtol=1e-6)


def test_the_first_group_that_matches_takes_a_parameter():
    paths = {
        "blocks/0/attention/query/delta/r1": "adapter",
        "blocks/0/attention/query/bias": "bias",
        "blocks/0/attention/query/kernel": "rest",
        "blocks/0/norm1/bias": "norm",
        "blocks/0/norm2/scale": "norm",
        "norm/bias": "norm",
        "head/bias": "head",
        "head/delta/r1": "adapter",
        "position_embed": "rest",
    }
    assert groups_of(paths, GroupsConfig()) == paths


def test_a_pattern_matches_whole_paths():
    groups = GroupsConfig(adapter=GroupConfig(pattern="head"), bias=GroupConfig(pattern=r".*/head/bias"))
    assert groups_of(["head/bias"], groups) == {"head/bias": "head"}


def test_a_parameter_in_no_group_is_refused_by_name():
    groups = GroupsConfig(rest=GroupConfig(pattern="nothing"))
    with pytest.raises(UserError, match="position_embed"):
        groups_of(["head/bias", "position_embed"], groups)


@pytest.mark.parametrize(
    "groups",
    [
        {"head": GroupConfig(pattern="classifier/.*", learning_rate=5e-3)},
        # The pattern of an earlier group matches the same parameters, so that none are left for the group `head`.
        {"adapter": GroupConfig(pattern="head/.*"), "head": GroupConfig(pattern="head/.*", learning_rate=5e-3)},
    ],
)
def test_a_learning_rate_of_a_group_without_parameters_is_refused(groups):
    config, paths = OptimConfig(learning_rate=RATES, groups=GroupsConfig(**groups)), ["head/kernel", "head/bias"]
    message = "optim.groups.head has learning_rate=0.005, but no parameter: .*trained .head/bias, head/kernel."
    with pytest.raises(UserError, match=message):
        Rates(config, "lora", paths)
    # A group without a learning rate of its own may have no parameters. For example, the weight decays in configs/ are
    # for groups that not all methods train.
    groups["head"] = dataclasses.replace(groups["head"], learning_rate=0.0, weight_decay=0.1)
    config = dataclasses.replace(config, groups=GroupsConfig(**groups))
    assert set(Rates(config, "lora", paths).before(1).values()) == {np.float32(RATES["lora"])}


@pytest.mark.exhaustive
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_updates_are_those_of_adamw_by_hand(clip_norm):
    config = OptimConfig(
        steps=6,
        warmup_ratio=1 / 3,
        decay="linear",
        clip_norm=clip_norm,
        learning_rate=RATES,
        groups=GroupsConfig(
            adapter=GroupConfig(pattern=r".*/delta/.*"),
            head=GroupConfig(pattern=r"head/.*", learning_rate=0.5, weight_decay=0.1),
        ),
    )
    rng = np.random.default_rng(0)
    arrays = {"q/delta/r1": rng.normal(size=4), "head/kernel": rng.normal(size=(4, 3)), "q/bias": rng.normal(size=2)}
    rates = {"q/delta/r1": RATES["lora"], "head/kernel": 0.5, "q/bias": RATES["lora"]}
    decays = {"q/delta/r1": 0.0, "head/kernel": 0.1, "q/bias": 0.0}
    optimizer, by_group = make_optimizer(config, arrays), Rates(config, "lora", arrays)
    params = {path: jnp.asarray(array, jnp.float32) for path, array in arrays.items()}
    state = optimizer.init(params)
    first = {path: np.zeros_like(array) for path, array in arrays.items()}
    second = {path: np.zeros_like(array) for path, array in arrays.items()}
    for step in range(6):
        # The gradients grow by a factor of 10 in each step, so that only the later ones are clipped. If all gradients
        # were scaled by the same factor, Adam's updates would not change.
        gradients = {path: 10.0 ** (step - 3) * rng.normal(size=array.shape) for path, array in arrays.items()}
        updates, state = optimizer.update(
            {path: jnp.asarray(gradient, jnp.float32) for path, gradient in gradients.items()},
            state,
            params,
            rates=by_group.before(step + 1),
        )
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        for path, gradient in gradients.items():
            if clip_norm and norm > clip_norm:
                gradient = gradient * clip_norm / norm
            first[path] = 0.9 * first[path] + 0.1 * gradient
            second[path] = 0.999 * second[path] + 0.001 * gradient**2
            mean = first[path] / (1 - 0.9 ** (step + 1))
            scale = np.sqrt(second[path] / (1 - 0.999 ** (step + 1))) + 1e-8
            decay = decays[path] * np.asarray(params[path])
            expected = -rates[path] * factor(config, step) * (mean / scale + decay)
            np.testing.assert_allclose(updates[path], expected, rtol=2e-4, atol=1e-7, err_msg=f"{path} at {step}")
        params = {path: params[path] + updates[path] for path in params}


def test_weights_decay_only_where_asked():
    config = dataclasses.replace(
        OptimConfig(learning_rate=RATES, decay="constant"),
        groups=GroupsConfig(norm=GroupConfig(pattern="norm/.*", weight_decay=0.5)),
    )
    params = {"norm/scale": jnp.ones(3), "head/kernel": jnp.ones(3), "position_embed": jnp.ones(3)}
    optimizer, rates = make_optimizer(config, params), Rates(config, "full", params)
    zeros = {path: jnp.zeros(3) for path in params}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, rates=rates.before(1))
    np.testing.assert_allclose(updates["norm/scale"], -RATES["full"] * 0.5, rtol=1e-6)
    assert not np.any(updates["head/kernel"]) and not np.any(updates["position_embed"])


@pytest.mark.parametrize("method", RATES)
def test_every_method_has_its_learning_rate(method):
    config = OptimConfig(learning_rate=RATES)
    optimizer, rates = make_optimizer(config, ["head/bias"]), Rates(config, method, ["head/bias"])
    params = {"head/bias": jnp.zeros(1)}
    updates, _ = optimizer.update({"head/bias": jnp.ones(1)}, optimizer.init(params), params, rates=rates.before(1))
    np.testing.assert_allclose(updates["head/bias"], -RATES[method], rtol=1e-5)
