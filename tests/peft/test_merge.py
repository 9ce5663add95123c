import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import CirculantAdapter, CirculantUpdate, LoRA, Rule, adapt, adapted_modules, merge
from tests.peft.cases import CASES, trained
from tests.peft.models import MODELS, TOLERANCES, base, inputs, materialize, relative_error, run, same_bits


def test_an_update_below_half_a_unit_of_bfloat16_is_reported_as_lost():
    layer = nnx.Linear(2, 2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((2, 2), jnp.bfloat16)
    model, _ = adapt(layer, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model.delta["default"].A[...], model.delta["default"].B[...] = jnp.full((2, 1), 2.0**-5), jnp.full((2, 1), 2.0**-5)
    merged, deviation = merge(model)
    assert same_bits(merged.kernel[...], layer.kernel[...])
    assert deviation == 2.0**-10


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["delta/B", "kernel"])
def test_values_that_are_not_finite_are_refused_by_name(value, where):
    model = nnx.clone(trained("mlp", "lora")[0])
    layer = model.blocks[1]
    variable = layer.kernel if where == "kernel" else layer.delta["default"].B
    variable[...] = variable[...].at[0, 0].set(value)
    with pytest.raises(UserError, match=r"^blocks/1 cannot be merged: .*not finite"):
        merge(model)


def test_a_merged_model_can_be_adapted_again():
    merged, _ = merge(trained("mlp", "lora")[0])
    again, _ = adapt(merged, [Rule("head", LoRA())], rngs=nnx.Rngs(1))
    assert same_bits(again(inputs("mlp")), merged(inputs("mlp")))


@pytest.mark.parametrize("method", ["circulant", "lora_fix", "dora"])
def test_merging_works_in_tree_mode(method):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        original = materialize(MODELS["mlp"].make)
        model, _ = adapt(original, [CASES[method].rule("mlp")], rngs=nnx.Rngs(1))
        for variable in model.blocks[0].delta["default"].tensors().values():
            variable[...] = variable[...] + 0.5
        merged, _ = merge(model)
        assert nnx.graphdef(merged) == nnx.graphdef(original)
        assert relative_error(merged(inputs("mlp")), original(inputs("mlp"))) > 0.01
        assert relative_error(merged(inputs("mlp")), model(inputs("mlp"))) <= TOLERANCES["float32"]


def test_names():
    model, _ = adapt(trained("mlp", "lora")[0], [Rule("head", CirculantUpdate())], name="other", rngs=nnx.Rngs(1))
    model.head.delta["other"].r1[...] = jnp.arange(4.0)
    x = inputs("mlp")
    part, _ = merge(model, ["other"])
    assert {name for _, name, *_ in adapted_modules(part)} == {"default"} and type(part.head) is nnx.Linear
    assert relative_error(run(part, x), run(model, x)) <= TOLERANCES["float32"]
    whole, _ = merge(part)
    assert nnx.graphdef(whole) == nnx.graphdef(base("mlp"))
    assert relative_error(run(whole, x), run(model, x)) <= TOLERANCES["float32"]
    with pytest.raises(UserError, match=r"no adapter 'othr'; did you mean 'other'\? \(there: default, other\)"):
        merge(model, ["other", "othr"])
    with pytest.raises(UserError, match=r"the model has no adapter 'default' \(there: none\)"):
        merge(base("mlp"), ["default"])


def test_a_branch_of_another_adapter_does_not_hinder():
    model, _ = adapt(trained("mlp", "lora")[0], [Rule("head", CirculantAdapter())], name="other", rngs=nnx.Rngs(1))
    merged, _ = merge(model, ["default"])
    assert {name for _, name, *_ in adapted_modules(merged)} == {"other"}
    with pytest.raises(UserError, match=r"^head has a branch of the adapter 'other'"):
        merge(model)


@pytest.mark.parametrize("method", ["circulant", "dora"])
def test_the_scale_is_merged(method):
    model = nnx.clone(trained("mlp", method)[0])
    for _, _, delta, _ in adapted_modules(model):
        delta.scale[...] = jnp.float32(0.3)
    assert relative_error(run(merge(model)[0], inputs("mlp")), run(model, inputs("mlp"))) <= TOLERANCES["float32"]
