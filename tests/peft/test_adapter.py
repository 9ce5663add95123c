import json

import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import Adapter, BitFit, CirculantBranch, CirculantUpdate, LoRA, Rule
from tests.peft.cases import ADDED
from tests.peft.models import base, parameters, trainable_paths

BIASES = {"blocks/0/bias", "tail/gate/bias", "tail/norm/bias", "head/bias"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set()),
        (("head/kernel",), {"head/kernel"}),
        (("head",), set()),  # This pattern does not match a whole path.
        ((r".*/bias", "tail/norm/.*"), {*BIASES, "tail/norm/scale"}),
        ((".*",), set(parameters(base("mlp")))),
    ],
)  # fmt: skip
def test_trainable_follows_whole_path_patterns(patterns, expected):
    assert trainable_paths(base("mlp"), Adapter((), patterns)) == expected


def test_trainable_takes_parameters_alone():
    model = nnx.Dict(norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)), dropout=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert trainable_paths(model, Adapter((), (".*",))) == {"norm/scale", "norm/bias"}


@pytest.mark.parametrize("method", ADDED)
def test_json_round_trip(method):
    adapter = Adapter((Rule("a/.*", ADDED[method].method), Rule("b", LoRA(rank=3))), ("head/.*", "norm/scale"))
    recipe = json.loads(json.dumps(adapter.to_json()))
    assert Adapter.from_json(recipe) == adapter
    assert [rule["target"] for rule in recipe["rules"]] == ["a/.*", "b"]
    assert recipe["rules"][1] == {
        "target": "b",
        "method": "lora",
        "settings": {"alpha": 1.0, "learn_alpha": False, "dropout": 0.0, "rank": 3},
        "parts": 1,
        "which": [],
    }


def test_json_round_trip_of_rules_without_method_and_of_parts_under_another_name():
    rules = (Rule("a", None), Rule("b", LoRA(), parts=3, which=(2, 0)))
    recipe = json.loads(json.dumps(Adapter(rules, name="mine").to_json()))
    assert Adapter.from_json(recipe, "yours") == Adapter(rules, name="yours")
    assert "mine" not in json.dumps(recipe)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a.b"])
def test_names_that_cannot_be_a_part_of_a_path(name):
    with pytest.raises(UserError, match="the name of an adapter may have only letters, digits, _ and -"):
        Adapter((), name=name)


@pytest.mark.parametrize("name", ["items", "values", "update"])
def test_names_that_would_hide_a_method(name):
    with pytest.raises(UserError, match=f"an adapter cannot be called '{name}': nnx.Dict has a method of this name"):
        Adapter((), name=name)


@pytest.mark.parametrize(
    ("parts", "which"), [(3, (3,)), (3, (-1,)), (3, (0, 0)), (0, ()), (-2, ()), (1, (1,)), (2, (0, 1, 2))]
)
def test_parts_that_cannot_be(parts, which):
    with pytest.raises(
        UserError, match=rf"the rule 'qkv' must have parts >= 1, and different numbers .* got parts={parts}, which="
    ):
        Rule("qkv", LoRA(), parts=parts, which=which)


def test_parts_are_for_updates():
    for method in (None, CirculantBranch()):
        with pytest.raises(UserError, match="the rule 'qkv' has parts, but only updates of kernels have parts"):
            Rule("qkv", method, parts=3)


RULE = {"target": "a", "method": "lora", "settings": {}, "parts": 1, "which": []}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"train": []}, "not the recipe of an adapter .*rules"),
        ({"rules": []}, "not the recipe of an adapter .*train"),
        ({"rules": "lora", "train": []}, "not the recipe of an adapter"),
        ({"rules": [{"target": "a", "method": "lora"}], "train": []}, "not the recipe of an adapter .*settings"),
        ({"rules": [{k: v for k, v in RULE.items() if k != "parts"}], "train": []}, "not the recipe .*parts"),
        ({"rules": [RULE | {"parts": "3"}], "train": []}, "must have whole numbers in `parts`"),
        ({"rules": [RULE | {"which": 3}], "train": []}, "not the recipe of an adapter"),
        ({"rules": [RULE | {"which": [7]}], "train": []}, "must have parts >= 1, and different numbers"),
        ({"rules": [RULE | {"settings": [1]}], "train": []}, "not the recipe of an adapter"),
        ({"rules": [RULE | {"method": ["lora"]}], "train": []}, "not the recipe of an adapter"),
        ({"rules": [RULE | {"method": "lorra"}], "train": []}, "did you mean 'lora'"),
        ({"rules": [RULE | {"target": 5}], "train": []}, "must be a string, got 5"),
        ({"rules": [RULE | {"target": "("}], "train": []}, "not a regular expression"),
        (None, "not the recipe of an adapter"),
    ],
)
def test_another_recipe_is_refused(recipe, message):
    with pytest.raises(UserError, match=message):
        Adapter.from_json(recipe)


def test_a_rule_needs_a_pattern_and_an_update():
    with pytest.raises(UserError, match=r"'blocks/\(' is not a regular expression"):
        Rule("blocks/(", LoRA())
    with pytest.raises(UserError, match=r"rule 'blocks' must be an update .*, a branch or None, got 'lora'"):
        Rule("blocks", "lora")
    with pytest.raises(UserError, match="must be an update"):
        Rule("blocks", CirculantUpdate)
    with pytest.raises(UserError, match="must be an update"):
        Rule("blocks", BitFit())
