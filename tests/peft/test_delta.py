import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import AdapterParam, adapt
from surm_jax.peft.delta import Adapted, Delta, attach, detach
from surm_jax.structured import CirculantPair, LowRank
from tests.peft.cases import (
    EVERY,
    MODELS,
    TOLERANCES,
    Gated,
    base,
    dense_updates,
    fresh,
    inputs,
    materialize,
    parameters,
    relative_error,
    trained,
    update_parameters,
)


def explicit(name, update):
    """The base model with the updates added to its kernels in float64, by the oracle: what merging must amount to."""
    changes = dense_updates(name, update, trained(name, update)[0])
    tuned = parameters(trained(name, update)[0])
    graphdef, state = nnx.split(base(name))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        where = "/".join(map(str, path))
        value, layer = tuned[where], where.removesuffix("kernel").removesuffix("/")
        if where.endswith("kernel") and layer in changes:
            # Not back to bfloat16: that is what merging does, and loses.
            value = (value.astype(np.float64) + changes[layer].reshape(value.shape)).astype(np.float32)
        flat.append((path, variable.replace(jnp.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_output_is_that_of_kernel_plus_factor_times_dense(name, update):
    model, _ = trained(name, update)
    x = inputs(name)
    y = model(x)
    assert relative_error(y, base(name)(x)) > 0.05, "the start is too near to the base to show anything"
    assert relative_error(y, explicit(name, update)(x)) <= TOLERANCES[MODELS[name].precision]
    assert y.dtype == base(name)(x).dtype


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        *itertools.product(["mlp", "attention", "own_call", "axes"], ["fft", "dense", "fused"]),
        *itertools.product(["bfloat16_kernels"], ["fft", "dense"]),
    ],
)
def test_every_execution_gives_the_same(name, execution):
    model, adapter = trained(name, "circulant")
    other, _ = adapt(base(name), adapter.rules, train=adapter.train, execution=execution, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model))
    x, case = inputs(name), MODELS[name]
    assert relative_error(other(x), explicit(name, "circulant")(x)) <= TOLERANCES[case.precision]


def test_fused_is_refused_in_half_precision():
    rules = trained("bfloat16_kernels", "circulant")[1].rules
    other, _ = adapt(base("bfloat16_kernels"), rules, execution="fused", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="'fused' adds the update to the kernel, and would lose it in bfloat16"):
        other(inputs("bfloat16_kernels"))


def test_an_unknown_execution():
    with pytest.raises(UserError, match=r"no execution is called 'fussed'.*'fused'"):
        adapt(base("mlp"), trained("mlp", "lora")[1].rules, execution="fussed", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("execution", ["fft", "fused"])
@pytest.mark.parametrize("option", ["dot_general", "dot_general_cls"])
def test_a_product_of_the_layers_own_is_used(option, execution):
    calls = []

    def negative(*args, **kwargs):
        calls.append(args[1].shape)
        return -jax.lax.dot_general(*args, **kwargs)

    layer = nnx.LinearGeneral(
        6, (2, 2), rngs=nnx.Rngs(0), **{option: negative if option[-3:] != "cls" else lambda: negative}
    )
    plain = nnx.clone(layer)
    attach(layer, Delta(LowRank.init(jax.random.key(0), (6, 4), scale=1.0, rank=1), 0.5, execution))
    x = jnp.ones((3, 6))
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
    assert calls == [(6, 4), (6, 2, 2)]
    detach(layer)
    np.testing.assert_array_equal(layer(x), plain(x))


@pytest.mark.parametrize(("name", "update"), EVERY)
def test_update_parameters_are_float32_beside_unchanged_paths(name, update):
    model, _ = fresh(name, update)
    updates, everything = update_parameters(model), parameters(model)
    assert {array.dtype for array in updates.values()} == {np.dtype("float32")}
    assert everything.keys() - updates.keys() == parameters(base(name)).keys()
    prefixes = {path.rpartition("/")[0] for path in updates}
    assert prefixes == {f"{path}/delta" if path else "delta" for path in MODELS[name].shapes}


def layer_pair(cls=nnx.Linear, *sizes):
    layer = materialize(lambda: cls(*(sizes or (6, 4)), rngs=nnx.Rngs(0)))
    plain = nnx.clone(layer)
    shape = (6, int(np.prod(sizes[1] if sizes else 4)))
    attach(layer, Delta(LowRank.init(jax.random.key(0), shape, scale=1.0, rank=1), 0.5))
    return layer, plain


@pytest.mark.parametrize(
    ("cls", "sizes"), [(nnx.Linear, (6, 4)), (nnx.LinearGeneral, (6, (2, 3))), (Gated, (6, 4)), (nnx.LoRALinear, None)]
)
def test_attach_keeps_the_class_above_and_detach_brings_it_back(cls, sizes):
    if cls is nnx.LoRALinear:
        layer = nnx.LoRALinear(6, 4, lora_rank=1, rngs=nnx.Rngs(0))
        plain = nnx.clone(layer)
        attach(layer, Delta(LowRank.init(jax.random.key(0), (6, 4), scale=1.0, rank=1), 0.5))
    else:
        layer, plain = layer_pair(cls, *sizes)
    assert isinstance(layer, cls) and isinstance(layer, Adapted)
    assert type(layer).__name__ == f"Adapted{cls.__name__}"
    assert (layer.in_features, layer.out_features) == (plain.in_features, plain.out_features)
    detach(layer)
    assert type(layer) is cls
    assert nnx.graphdef(layer) == nnx.graphdef(plain)


def test_two_layers_of_a_class_share_the_adapted_class():
    assert type(layer_pair()[0]) is type(layer_pair()[0])


@pytest.mark.parametrize("call", [lambda f, x: f(x), lambda f, x: f(inputs=x), lambda f, x: f(x, None),
                                  lambda f, x: f(x, out_sharding=None)])  # fmt: skip
def test_every_way_to_call_a_linear_layer_works(call):
    layer, plain = layer_pair()
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(call(layer, x), call(plain, x))


def test_an_argument_of_a_subclass_arrives():
    layer, plain = layer_pair(Gated)
    layer.delta.A[...] = jnp.ones((4, 1))
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(layer(x, 3.0), 2.0 * layer(x, gain=1.5), rtol=1e-6)
    assert relative_error(layer(x, 3.0), plain(x, 3.0)) > 0.05


def test_delta_holds_adapter_parameters_under_the_names_of_the_matrix():
    matrix = CirculantPair(jnp.arange(3.0), jnp.ones(3), shape=(3, 2))
    delta = Delta(matrix, 2.0)
    assert isinstance(delta.r1, AdapterParam) and isinstance(delta.r2, AdapterParam)
    delta.r2[...] = jnp.array([1.0, 2.0, 3.0])
    # The first row of a circulant is its vector, here r1 * r2, and every other row is turned by one.
    np.testing.assert_array_equal(delta.matrix().to_dense(), [[0.0, 2.0], [6.0, 0.0], [2.0, 6.0]])


def test_adapted_layers_work_under_transformations():
    layer, _ = layer_pair()
    layer.delta.A[...] = jnp.ones((4, 1))
    graphdef, state = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    call = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
    np.testing.assert_allclose(jax.jit(call)(state, x), layer(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(call, (None, 0))(state, x), layer(x), rtol=1e-5, atol=1e-6)
