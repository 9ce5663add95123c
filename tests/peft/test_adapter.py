import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import Adapter, CirculantUpdate, LoRA, Rule, adapt
from tests.peft.cases import EVERY, MODELS, UPDATE_CASES, base, fresh, inputs, parameters, same_bits, update_parameters

BIASES = {"blocks/0/bias", "tail/gate/bias", "tail/norm/bias", "head/bias"}


def trainable_paths(model, adapter):
    _, trainable, _ = nnx.split(model, adapter.trainable, ...)
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_trainable_are_the_updates_and_the_head(name, update):
    model, adapter = fresh(name, update)
    head = {"head/kernel", "head/bias"} if MODELS[name].train else set()
    assert trainable_paths(model, adapter) == update_parameters(model).keys() | head


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set()),
        (("head/kernel",), {"head/kernel"}),
        (("head",), set()),  # a part of a path
        ((r".*/bias", "tail/norm/.*"), {*BIASES, "tail/norm/scale"}),
        ((".*",), set(parameters(base("mlp")))),
    ],
)  # fmt: skip
def test_trainable_follows_whole_path_patterns(patterns, expected):
    assert trainable_paths(base("mlp"), Adapter((), patterns)) == expected


def test_trainable_takes_parameters_alone():
    model = nnx.Dict(norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)), dropout=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    assert trainable_paths(model, Adapter((), (".*",))) == {"norm/scale", "norm/bias"}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("update", UPDATE_CASES)
def test_plain_gradients_of_the_trainable_part_train_it_alone(graph, update):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        original = nnx.clone(base("mlp"))
        model, adapter = adapt(
            original, [Rule(r"blocks/\d+", UPDATE_CASES[update].update)], train=["head/.*"], rngs=nnx.Rngs(1)
        )
        graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)
        x = inputs("mlp")

        @jax.jit
        def step(trainable, frozen):
            def loss(trainable):
                y = nnx.merge(graphdef, trainable, frozen)(x)
                return jnp.sum((y - jnp.linspace(0, 1, y.size).reshape(y.shape)) ** 2)

            value, gradient = jax.value_and_grad(loss)(trainable)
            return value, jax.tree.map(lambda p, g: p - 0.02 * g, trainable, gradient)

        losses = []
        for _ in range(4):
            value, trainable = step(trainable, frozen)
            losses.append(float(value))
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
        after, before = parameters(nnx.merge(graphdef, trainable, frozen)), parameters(model)
        for path in before:
            moved = path.startswith("head/") or "/delta/" in path
            assert same_bits(before[path], after[path]) is not moved, path


@pytest.mark.parametrize("update", UPDATE_CASES)
def test_json_round_trip(update):
    adapter = Adapter((Rule("a/.*", UPDATE_CASES[update].update), Rule("b", LoRA(rank=3))), ("head/.*", "norm/scale"))
    recipe = json.loads(json.dumps(adapter.to_json()))
    assert Adapter.from_json(recipe) == adapter
    assert [rule["target"] for rule in recipe["rules"]] == ["a/.*", "b"]
    assert recipe["rules"][1] == {"target": "b", "method": "lora", "settings": {"alpha": 1.0, "rank": 3}}


RULE = {"target": "a", "method": "lora", "settings": {}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"train": []}, "not the recipe of an adapter .*rules"),
        ({"rules": []}, "not the recipe of an adapter .*train"),
        ({"rules": "lora", "train": []}, "not the recipe of an adapter"),
        ({"rules": [{"target": "a", "method": "lora"}], "train": []}, "not the recipe of an adapter .*settings"),
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
    with pytest.raises(UserError, match=r"rule 'blocks' must be an Update such as LoRA\(\), got 'lora'"):
        Rule("blocks", "lora")
    with pytest.raises(UserError, match="must be an Update"):
        Rule("blocks", CirculantUpdate)
