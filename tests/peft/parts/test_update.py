import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import AdapterConstant, AdapterParam, LoRA, Place, adapt
from surm_jax.peft.parts.layers import attach, detach
from surm_jax.peft.parts.update import StoredMatrix, UpdatePart
from surm_jax.structured import CirculantPair, Dense, LowRank, Placed, Sum
from tests.peft.cases import expected_output, trained
from tests.peft.models import MODELS, TOLERANCES, Gated, base, inputs, materialize, relative_error


def half_lora(layer: nnx.Module, execution: str = "auto") -> None:
    """Attach a new LoRA update of rank one with alpha 0.5, which is zero, to a layer with 6 input features."""
    kernel = layer.kernel[...].reshape(6, -1)
    place = Place(kernel.shape[1], kernel, execution=execution)
    attach(layer, "default", LoRA(alpha=0.5).make_part(place, jax.random.key(0)))


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
    expected = expected_output(name, {"default": "circulant"}, model, x)
    assert relative_error(other(x), expected) <= TOLERANCES[case.precision]


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
    half_lora(layer, execution)
    x = jnp.ones((3, 6))
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
    assert calls == [(6, 2, 2)] * 2
    detach(layer, "default")
    np.testing.assert_array_equal(layer(x), plain(x))


def layer_pair(cls=nnx.Linear, *sizes):
    layer = materialize(lambda: cls(*(sizes or (6, 4)), rngs=nnx.Rngs(0)))
    plain = nnx.clone(layer)
    half_lora(layer)
    return layer, plain


@pytest.mark.parametrize("call", [lambda f, x: f(x), lambda f, x: f(inputs=x), lambda f, x: f(x, None),
                                  lambda f, x: f(x, out_sharding=None)])  # fmt: skip
def test_every_way_to_call_a_linear_layer_works(call):
    layer, plain = layer_pair()
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(call(layer, x), call(plain, x))


def test_an_argument_of_a_subclass_arrives():
    layer, plain = layer_pair(Gated)
    layer.delta["default"].up[...] = jnp.ones((1, 4))
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(layer(x, 3.0), 2.0 * layer(x, gain=1.5), rtol=1e-6)
    assert relative_error(layer(x, 3.0), plain(x, 3.0)) > 0.05


def test_delta_holds_adapter_parameters_under_the_names_of_the_matrix():
    matrix = CirculantPair(jnp.arange(3.0), jnp.ones(3), shape=(3, 2))
    delta = UpdatePart(matrix, jnp.zeros((3, 2)), factor=2.0)
    assert isinstance(delta.r1, AdapterParam) and isinstance(delta.r2, AdapterParam)
    delta.r2[...] = jnp.array([1.0, 2.0, 3.0])
    # The first row of a circulant is its vector, here 2 r1 * r2. Each further row is rotated by one entry.
    np.testing.assert_array_equal(delta.matrix().to_dense(), [[0.0, 4.0], [12.0, 0.0], [4.0, 12.0]])


def test_adapted_layers_work_under_transformations():
    layer, _ = layer_pair()
    layer.delta["default"].up[...] = jnp.ones((1, 4))
    graphdef, state = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    call = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
    np.testing.assert_allclose(jax.jit(call)(state, x), layer(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(call, (None, 0))(state, x), layer(x), rtol=1e-5, atol=1e-6)


# Stored matrices


def pair():
    return CirculantPair(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]), shape=(3, 2))


def low_rank():
    return LowRank(down=jnp.array([[1.0], [2.0], [3.0]]), up=jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("matrix", "names"),
    [
        (pair(), ("r1", "r2")),
        (Dense(jnp.ones((3, 2))), ("W",)),
        (Placed(pair(), (3, 4), (0, 2)), ("matrix_r1", "matrix_r2")),
        (Sum((pair(), low_rank())), ("terms_0_r1", "terms_0_r2", "terms_1_down", "terms_1_up")),
    ],
)
def test_arrays_are_parameters_by_the_names_of_the_matrix(matrix, names):
    part = StoredMatrix(matrix)
    assert part.names == names
    assert all(type(getattr(part, name)) is AdapterParam for name in names)
    assert part.stored() == matrix and part.stored().shape == matrix.shape
    # Parts that differ in other fields than arrays have different graph definitions, and need programs of their own.
    other = StoredMatrix(jax.tree.map(lambda leaf: leaf + 1, matrix))
    assert nnx.graphdef(part) == nnx.graphdef(other)
    assert nnx.graphdef(part) != nnx.graphdef(StoredMatrix(Placed(matrix, (9, 9), (0, 0))))
    graphdef, state = nnx.split(part)
    np.testing.assert_array_equal(
        jax.jit(lambda state: nnx.merge(graphdef, state).stored().to_dense())(state), matrix.to_dense()
    )


def test_frozen_arrays_are_constants_wherever_in_a_composite():
    part = StoredMatrix(Sum((Placed(low_rank(), (3, 4), (0, 2)), Placed(pair(), (3, 4), (0, 0)))), frozen=("down",))
    kinds = {name: type(getattr(part, name)) for name in part.names}
    assert kinds.pop("terms_0_matrix_down") is AdapterConstant
    assert set(kinds.values()) == {AdapterParam} and len(kinds) == 3


def test_what_changes_is_seen():
    part = StoredMatrix(pair())
    part.r1[...] = jnp.array([0.0, 1.0, 0.0])
    np.testing.assert_array_equal(part.stored().to_dense(), [[0, 5], [0, 0], [5, 0]])


def test_compacting():
    part, dense = StoredMatrix(Sum((pair(), low_rank())), frozen=("down",)), Sum((pair(), low_rank())).to_dense()
    part.compact()
    assert part.names == ("terms_0_c", "terms_1_down", "terms_1_up")
    assert not hasattr(part, "terms_0_r1") and type(part.terms_1_down) is AdapterConstant
    np.testing.assert_array_equal(part.stored().to_dense(), dense)
    structure = nnx.graphdef(part)
    part.compact()
    assert nnx.graphdef(part) == structure
