import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn import dtypes

from surm_jax.errors import UserError
from surm_jax.peft import CirculantBranch, CirculantUpdate, DoRA, LoRA, Rule, adapt, iter_parts, merge
from tests.peft.cases import CASES, trained
from tests.peft.models import MODELS, TOLERANCES, base, inputs, materialize, relative_error, run, same_bits


def test_an_update_below_half_a_unit_of_bfloat16_is_reported_as_lost():
    layer = nnx.Linear(2, 2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((2, 2), jnp.bfloat16)
    model, _ = adapt(layer, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model.delta["default"].down[...], model.delta["default"].up[...] = (
        jnp.full((2, 1), 2.0**-5),
        jnp.full((1, 2), 2.0**-5),
    )
    merged, deviation = merge(model)
    assert same_bits(merged.kernel[...], layer.kernel[...])
    assert deviation == 2.0**-10


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["delta/down", "kernel"])
def test_values_that_are_not_finite_are_refused_by_name(value, where):
    model = nnx.clone(trained("mlp", "lora")[0])
    layer = model.blocks[1]
    variable = layer.kernel if where == "kernel" else layer.delta["default"].down
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
    adapted, _ = adapt(base("mlp"), [CASES["lora"].rule("mlp")], rngs=nnx.Rngs(1))
    model, _ = adapt(adapted, [Rule("head", CirculantUpdate())], name="other", rngs=nnx.Rngs(1))
    model.head.delta["other"].r1[...] = jnp.arange(4.0)
    x = inputs("mlp")
    part, _ = merge(model, ["other"])
    assert {name for _, name, *_ in iter_parts(part)} == {"default"} and type(part.head) is nnx.Linear
    assert relative_error(run(part, x), run(model, x)) <= TOLERANCES["float32"]
    whole, _ = merge(part)
    assert nnx.graphdef(whole) == nnx.graphdef(base("mlp"))
    assert relative_error(run(whole, x), run(model, x)) <= TOLERANCES["float32"]
    with pytest.raises(UserError, match=r"no adapter 'othr'; did you mean 'other'\? \(known: default, other\)"):
        merge(model, ["other", "othr"])
    with pytest.raises(UserError, match=r"the model has no adapter 'default' \(known: none\)"):
        merge(base("mlp"), ["default"])


def test_a_kernel_that_another_adapter_trained_is_not_merged_into():
    model, _ = adapt(trained("mlp", "lora")[0], [Rule("head", CirculantUpdate())], name="other", rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match=r"^head/kernel was trained by the adapter 'default', and merging another"):
        merge(model, ["other"])
    whole, _ = merge(model)
    assert nnx.graphdef(whole) == nnx.graphdef(base("mlp"))


def test_a_branch_of_another_adapter_does_not_hinder():
    model, _ = adapt(trained("mlp", "lora")[0], [Rule("head", CirculantBranch())], name="other", rngs=nnx.Rngs(1))
    merged, _ = merge(model, ["default"])
    assert {name for _, name, *_ in iter_parts(merged)} == {"other"}
    with pytest.raises(UserError, match=r"^head has a part of the adapter 'other' that .* is not linear"):
        merge(model)


@pytest.mark.parametrize("method", ["circulant", "dora"])
def test_the_scale_is_merged(method):
    model = nnx.clone(trained("mlp", method)[0])
    for _, _, delta, _ in iter_parts(model):
        delta.scale[...] = jnp.float32(0.3)
    assert relative_error(run(merge(model)[0], inputs("mlp")), run(model, inputs("mlp"))) <= TOLERANCES["float32"]


class Tied(nnx.Module):
    """A model with two layers that share a kernel."""

    def __init__(self):
        self.q = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.k = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        self.k.kernel = self.q.kernel

    def __call__(self, x):
        return self.q(x), self.k(x)


@pytest.mark.parametrize("pattern", ["q", "k", "q|k"])
def test_a_kernel_that_layers_share_is_merged_for_each_alone(pattern):
    original = Tied()
    model, _ = adapt(original, [Rule(pattern, LoRA())], rngs=nnx.Rngs(2))
    for scale, layer in ((0.5, model.q), (0.25, model.k)):
        if hasattr(layer, "delta"):
            layer.delta["default"].down[...] = scale * jnp.ones((4, 1))
            layer.delta["default"].up[...] = jnp.ones((1, 4))
    x = jnp.eye(4)
    merged, _ = merge(model)
    for ours, expected in zip(merged(x), model(x), strict=True):
        assert relative_error(ours, expected) <= TOLERANCES["float32"]
    assert same_bits(model.q.kernel[...], original.q.kernel[...])


def test_parameters_that_are_numpy_arrays_stay_the_callers():
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    kernel = np.array(layer.kernel[...])
    layer.kernel.set_value(kernel)
    before = kernel.copy()
    model, _ = adapt(layer, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model.delta["default"].up[...] = jnp.ones((1, 4))
    model.delta["default"].down[...] = jnp.ones((4, 1))
    once, _ = merge(model)
    twice, _ = merge(model)
    np.testing.assert_array_equal(kernel, before)
    assert same_bits(once.kernel[...], twice.kernel[...])
    assert not np.array_equal(once.kernel[...], before)


def test_a_normalised_update_that_stays_is_in_the_way():
    model, _ = adapt(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), [Rule("", LoRA())], name="plain", rngs=nnx.Rngs(1))
    model, _ = adapt(model, [Rule("", DoRA())], name="norms", rngs=nnx.Rngs(2))
    with pytest.raises(UserError, match="a part of the adapter 'norms' that depends on the kernel"):
        merge(model, ["plain"])
    for names in (["norms"], ["plain", "norms"]):
        for _, _, part, _ in iter_parts(model):
            part.up[...] = jnp.ones((1, 4)) / 2
        x = jnp.eye(4)
        assert relative_error(merge(model, names)[0](x), model(x)) <= TOLERANCES["float32"]


def test_columns_of_zeros_are_left_as_they_are():
    layer = nnx.Linear(4, 4, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    model, _ = adapt(layer, [Rule("", DoRA())], rngs=nnx.Rngs(1))
    assert np.array_equal(model(jnp.eye(4)), np.zeros((4, 4)))
    assert np.array_equal(merge(model)[0](jnp.eye(4)), np.zeros((4, 4)))


def halved(inputs, kernel, *args, **options):
    """Multiply by a kernel whose entries are rounded to halves, as a quantised product does."""
    return jax.lax.dot_general(inputs, jnp.round(2 * kernel) / 2, *args, **options)


def rounded(arrays, **options):
    return tuple(array if array is None else jnp.round(array, 1) for array in dtypes.promote_dtype(arrays, **options))


@pytest.mark.parametrize("own", [{"dot_general": halved}, {"promote_dtype": rounded}])
def test_a_product_of_its_own_is_merged_only_if_an_example_shows_that_it_may_be(own):
    layer = nnx.Linear(4, 4, **own, rngs=nnx.Rngs(0))
    model, _ = adapt(layer, [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model.delta["default"].up[...] = jnp.ones((1, 4))
    (name,) = own
    with pytest.raises(UserError, match=f"the model has its own {name}, .*: give merge an example"):
        merge(model)
    with pytest.raises(UserError, match="the merged model computes something else"):
        merge(model, example=jnp.ones((3, 4)))


def test_a_linear_product_of_its_own_is_merged_with_an_example():
    exact = functools.partial(jax.lax.dot_general, precision="highest")
    model, _ = adapt(nnx.Linear(4, 4, dot_general=exact, rngs=nnx.Rngs(0)), [Rule("", LoRA())], rngs=nnx.Rngs(1))
    model.delta["default"].up[...] = jnp.ones((1, 4))
    x = jnp.ones((3, 4))
    np.testing.assert_allclose(merge(model, example=x)[0](x), model(x), rtol=1e-6)
