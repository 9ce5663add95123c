import dataclasses
import json
import math

import pytest

from surm_jax.errors import UserError
from surm_jax.peft import METHODS, LoRA
from surm_jax.training.config import RunConfig
from surm_jax.training.parsing import base_config, keys, parse, to_dict


def changed(**values):
    config = base_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def test_defaults_survive_the_round_trip():
    assert parse(base_config()) == RunConfig()
    assert parse(to_dict(RunConfig())) == RunConfig()
    assert base_config().to_dict() == to_dict(RunConfig())


def test_changed_values_survive_the_round_trip_through_json():
    config = parse(
        changed(
            seeds=(3, 1),
            model__dropout=0.1,
            peft__train=("head/.*", "norm/.*"),
            peft__lora__rank=4,
            optim__groups__head__weight_decay=0.01,
            optim__learning_rate__lora=3e-4,
        )
    )
    assert config.seeds == (3, 1)
    assert config.peft.methods["lora"] == LoRA(rank=4)
    assert config.peft.train == ("head/.*", "norm/.*")
    assert config.optim.groups.head.weight_decay == 0.01
    assert config.optim.learning_rate["lora"] == 3e-4
    assert parse(json.loads(json.dumps(to_dict(config)))) == config


def test_executions():
    assert parse(changed(peft__execution="dense", model__dtype="bfloat16")).peft.execution == "dense"
    with pytest.raises(UserError, match=r"config.peft.execution.*'fft'"):
        parse(changed(peft__execution="fff"))
    with pytest.raises(UserError, match=r"config.peft.execution=fused adds updates to the kernels, but .*bfloat16"):
        parse(changed(peft__execution="fused", model__dtype="bfloat16"))


def test_absent_keys_have_their_defaults():
    assert parse({"optim": {"steps": 7}}) == dataclasses.replace(
        RunConfig(), optim=dataclasses.replace(RunConfig().optim, steps=7)
    )


def test_keys_lists_sections_and_values():
    assert {"seeds", "peft", "peft.lora", "peft.lora.rank", "optim.groups.head.pattern"} <= set(keys(base_config()))
    assert len(keys(base_config())) == len(set(keys(base_config())))


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("", "sead", "seeds"),
        ("model", "variantt", "variant"),
        ("data", "batchsize", "batch_size"),
        ("peft", "circulent", "circulant"),
        ("peft", "metod", "method"),
        ("peft.lora", "rnk", "rank"),
        ("optim", "stepss", "steps"),
        ("optim.groups", "haed", "head"),
        ("optim.groups.head", "patern", "pattern"),
        ("optim.learning_rate", "circulent", "circulant"),
        ("log", "metric_every", "metrics_every"),
        ("mesh", "dta", "data"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(section, key, nearest):
    tree = to_dict(RunConfig())
    place = tree
    for name in section.split(".") if section else []:
        place = place[name]
    place[key] = {"rank": 1} if key == "circulent" and section == "peft" else 1.0
    with pytest.raises(UserError) as error:
        parse(tree)
    assert repr(key) in str(error.value)
    assert f"did you mean {nearest!r}" in str(error.value)
    assert section.split(".")[-1] in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seeds", 3),
        ("seeds", (0, 1.5)),
        ("seeds", ()),
        ("seeds", (1, 1)),
        ("seeds", (-1,)),
        ("model", 3),
        ("model", None),
        ("peft", None),
        ("peft", "lora"),
        ("model.variant", "B/17"),
        ("model.variant", 16),
        ("model.dtype", "float16"),
        ("model.num_classes", -1),
        ("model.num_classes", 2.0),
        ("model.image_size", -8),
        ("model.dropout", 1.0),
        ("model.dropout", math.nan),
        ("data.augment", "shfit"),
        ("data.batch_size", 0),
        ("data.batch_size", True),
        ("data.eval_batch_size", 0),
        ("data.holdout", -1),
        ("data.train_examples", -1),
        ("data.classes", ("cat",)),
        ("data.classes", "cat"),
        ("peft.method", "circulent"),
        ("peft.target", "blocks/(query"),
        ("peft.train", "head/.*"),
        ("peft.train", ("head/[",)),
        ("peft.train", (1,)),
        ("peft.lora", 3),
        ("peft.lora.rank", "4"),
        ("optim.steps", 0),
        ("optim.steps", "10"),
        ("optim.learning_rate", 0.1),
        ("optim.learning_rate.lora", -1.0),
        ("optim.learning_rate.lora", math.nan),
        ("optim.groups.head", 0.1),
        ("optim.groups.head.pattern", "("),
        ("optim.groups.head.learning_rate", -1.0),
        ("optim.groups.head.weight_decay", -1.0),
        ("optim.warmup_ratio", -0.1),
        ("optim.warmup_ratio", 1.0),
        ("optim.decay", "cosin"),
        ("optim.clip_norm", -0.1),
        ("optim.accumulate", 0),
        ("optim.accumulate", 3),
        ("optim.label_smoothing", 1.0),
        ("log.metrics_every", -1),
        ("log.evaluate_every", True),
        ("mesh.data", -1),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(key, value):
    tree = to_dict(RunConfig())
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[last] = value
    with pytest.raises(UserError) as error:
        parse(tree)
    # The message names the key. If the value is a wrong pattern, the message may name the pattern instead.
    assert last in str(error.value) or (value[0] if isinstance(value, tuple) else value) in str(error.value)


def test_a_name_that_is_nearly_right_is_told():
    with pytest.raises(UserError, match="did you mean 'circulant'"):
        parse(changed(peft__method="circulent"))
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        parse(changed(optim__decay="cosin"))


def test_an_integer_does_for_a_float():
    config = parse(changed(optim__learning_rate__full=1, optim__clip_norm=2))
    assert type(config.optim.learning_rate["full"]) is float
    assert (config.optim.learning_rate["full"], config.optim.clip_norm) == (1.0, 2.0)


def test_every_method_needs_a_learning_rate():
    config = base_config()
    config.optim.learning_rate = {"lora": 1e-2}
    config.peft.method = "lora"
    assert parse(config).optim.learning_rate == {"lora": 1e-2}
    config.peft.method = "full"
    with pytest.raises(UserError, match=r"config\.optim\.learning_rate.*full"):
        parse(config)


def test_every_method_has_settings_and_a_learning_rate():
    assert set(METHODS) == set(RunConfig().peft.methods) == set(base_config().optim.learning_rate)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().optim.steps = 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (({"method": "lora"},), r"config\.peft\.rules\.0 lacks the key 'target'"),
        (({"target": "qkv"}, {"target": "mlp", "metod": "lora"}), r"peft\.rules\.1 has no key 'metod'.*'method'"),
        (({"target": "qkv", "method": "lroa"},), r"got 'lroa'.*'lora'"),
        (({"target": "qkv", "method": "lora", "settings": {"rnak": 2}},), r"lora has no setting 'rnak'.*'rank'"),
        (({"target": 3},), r"config\.peft\.rules\.0\.target must be of the type str"),
    ],
)  # fmt: skip
def test_rules_of_their_own(rules, message):
    config = base_config()
    config.peft.rules = rules
    with pytest.raises(UserError, match=message):
        parse(config)
