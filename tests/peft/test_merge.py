import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import LoRA, Rule, adapt, merge
from tests.peft.cases import (
    EVERY,
    MODELS,
    TOLERANCES,
    UPDATE_CASES,
    base,
    dense_updates,
    fresh,
    inputs,
    materialize,
    parameters,
    relative_error,
    same_bits,
    trained,
)


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_the_merged_model_computes_the_same(name, update):
    model, _ = trained(name, update)
    merged, _ = merge(model)
    x = inputs(name)
    assert relative_error(merged(x), base(name)(x)) > 0.05
    assert relative_error(merged(x), model(x)) <= TOLERANCES[MODELS[name].precision]


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_the_merged_model_is_the_base_in_class_paths_and_structure(name, update):
    merged, _ = merge(trained(name, update)[0])
    assert nnx.graphdef(merged) == nnx.graphdef(base(name))
    expected = {path: type(module) for path, module in nnx.iter_modules(base(name))}
    assert {path: type(module) for path, module in nnx.iter_modules(merged)} == expected
    theirs = parameters(base(name))
    assert {p: (a.shape, a.dtype) for p, a in parameters(merged).items()} == {
        p: (a.shape, a.dtype) for p, a in theirs.items()
    }


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_kernels_of_the_target_gain_the_update_and_nothing_else_changes(name, update):
    model, _ = trained(name, update)
    before, after = parameters(model), parameters(merge(model)[0])
    changes = dense_updates(name, update, model)
    for path, array in after.items():
        layer = path.removesuffix("kernel").removesuffix("/")
        if path.endswith("kernel") and layer in changes:
            exact = before[path].astype(np.float64) + changes[layer].reshape(array.shape)
            # Half a unit in the last place of the kernel's dtype, and the rounding of the update itself.
            error = float(jnp.finfo(array.dtype).eps) / 2 + 1e-6
            np.testing.assert_allclose(array.astype(np.float64), exact, rtol=error, atol=1e-6)
        else:
            assert same_bits(array, before[path]), path


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_merging_is_idempotent_and_leaves_the_adapted_model_alone(name, update):
    model, _ = trained(name, update)
    structure, before = nnx.graphdef(model), parameters(model)
    once, _ = merge(model)
    assert nnx.graphdef(model) == structure
    assert all(same_bits(array, before[path]) for path, array in parameters(model).items())
    twice, deviation = merge(once)
    assert deviation == 0.0
    assert nnx.graphdef(twice) == nnx.graphdef(once)
    again = parameters(twice)
    assert all(same_bits(array, again[path]) for path, array in parameters(once).items())


@pytest.mark.parametrize("update", UPDATE_CASES)
def test_merging_a_fresh_adapter_gives_the_base(update):
    merged, deviation = merge(fresh("mlp", update)[0])
    assert deviation == 0.0
    assert all(same_bits(array, parameters(merged)[path]) for path, array in parameters(base("mlp")).items())


@pytest.mark.parametrize("name", ["mlp", "bfloat16_kernels"])
@pytest.mark.parametrize("update", UPDATE_CASES)
def test_the_deviation_is_the_largest_rounding_error(name, update):
    model, _ = trained(name, update)
    merged, deviation = merge(model)
    before, after = parameters(model), parameters(merged)
    changes = dense_updates(name, update, model)
    kernels = {f"{path}/kernel": change for path, change in changes.items()}
    errors = [after[p].astype(np.float64) - (before[p].astype(np.float64) + c) for p, c in kernels.items()]
    largest = max(np.abs(error).max() for error in errors)
    # The exact sum of `merge` starts from the update in float32, that of this test from its factors.
    assert deviation == pytest.approx(largest, rel=1e-3, abs=2e-7)
    unit = float(jnp.finfo(after["blocks/0/kernel"].dtype).eps)
    assert 0 < deviation <= unit * max(np.abs(after[p].astype(np.float64)).max() for p in kernels)


def test_an_update_below_half_a_unit_of_bfloat16_is_reported_as_lost():
    layer = nnx.Linear(2, 2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((2, 2), jnp.bfloat16)
    model, _ = adapt(layer, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model.delta.A[...], model.delta.B[...] = jnp.full((2, 1), 2.0**-5), jnp.full((2, 1), 2.0**-5)
    merged, deviation = merge(model)
    assert same_bits(merged.kernel[...], layer.kernel[...])
    assert deviation == 2.0**-10


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["delta/B", "kernel"])
def test_values_that_are_not_finite_are_refused_by_name(value, where):
    model = nnx.clone(trained("mlp", "lora")[0])
    layer = model.blocks[1]
    variable = layer.kernel if where == "kernel" else layer.delta.B
    variable[...] = variable[...].at[0, 0].set(value)
    with pytest.raises(UserError, match=r"^blocks/1 cannot be merged: .*not finite"):
        merge(model)


def test_a_merged_model_can_be_adapted_again():
    merged, _ = merge(trained("mlp", "lora")[0])
    again, _ = adapt(merged, [Rule("head", LoRA())], rngs=nnx.Rngs(1))
    assert same_bits(again(inputs("mlp")), merged(inputs("mlp")))


@pytest.mark.parametrize("update", UPDATE_CASES)
def test_merging_works_in_tree_mode(update):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        original = materialize(MODELS["mlp"].make)
        model, _ = adapt(original, [Rule(MODELS["mlp"].target, UPDATE_CASES[update].update)], rngs=nnx.Rngs(1))
        for name in model.blocks[0].delta.names:
            variable = getattr(model.blocks[0].delta, name)
            variable[...] = variable[...] + 0.5
        merged, _ = merge(model)
        assert nnx.graphdef(merged) == nnx.graphdef(original)
        assert relative_error(merged(inputs("mlp")), original(inputs("mlp"))) > 0.01
        assert relative_error(merged(inputs("mlp")), model(inputs("mlp"))) <= TOLERANCES["float32"]
