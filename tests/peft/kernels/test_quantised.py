"""Check that adapters over a base that qwix quantised compute and learn the same as over the dequantised base.

The tests are skipped if qwix is not installed (`requirements-peers.txt`).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import BottleneckBranch, DoRA, LoRA, Rule, adapt, check, load_adapter, merge, save_adapter
from surm_jax.peft.kernels.quantised import dequantise
from tests.peft.kernels.test_contract import METHODS, method_for
from tests.peft.models import perturb, relative_error, same_bits

qwix = pytest.importorskip("qwix", reason="quantises the base with qwix: pip install -r requirements-peers.txt")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
RULES = [Rule("body/.*", LoRA(rank=2))]
TYPES = {
    "int8": {"weight_qtype": "int8"},
    "nf4": {"weight_qtype": "nf4", "tile_size": 4},
    "activations": {"weight_qtype": "int8", "act_qtype": "int8"},
}


class Body(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.out = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.einsum = nnx.Einsum("bi,ino->bno", (8, 2, 4), rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.einsum(jnp.tanh(self.linear(x)))).reshape(x.shape))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.body = nnx.Conv(8, 8, 1, rngs=rngs), Body(rngs)

    def __call__(self, x):
        return self.body(jnp.tanh(self.conv(x[:, None])[:, 0]))


X = jax.random.normal(jax.random.key(1), (5, 8))


@functools.cache
def quantised(kind):
    target = ".*" if "act_qtype" in TYPES[kind] else "body/.*"  # qwix quantises both or none of a convolution.
    rule = qwix.QuantizationRule(module_path=target, **TYPES[kind])
    with jax.numpy_dtype_promotion("standard"):
        return qwix.quantize_model(Model(nnx.Rngs(0)), qwix.PtqProvider([rule]), X)


def plain(kind):
    """Return a model with the dequantised kernels that qwix does not reach."""
    quantised_model, model = nnx.clone(quantised(kind)), Model(nnx.Rngs(0))
    dequantise(quantised_model)
    for path in ("linear", "einsum", "out"):
        getattr(model.body, path).kernel = getattr(quantised_model.body, path).kernel
    return model


def loss_and_gradients(model, adapter):
    graphdef, trainable, frozen = nnx.split(model, adapter.trainable, ...)

    def loss(trainable):
        y = nnx.merge(graphdef, trainable, frozen, copy=True)(X)
        return jnp.sum(jnp.sin(3 * y) * jnp.linspace(1, 2, y.size).reshape(y.shape)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    return y, jax.tree.leaves(gradients)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # qwix needs it.
        yield


QUICK = {("lora", "int8"), ("dora", "nf4")}
EVERY = [
    pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.exhaustive)
    for pair in itertools.product(METHODS, ("int8", "nf4"))
]


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_values_and_gradients_are_those_over_the_dequantised_base(method, kind):
    rules = [Rule("body/(linear|einsum|out)", method_for("linear", method)), Rule("body", BottleneckBranch(waist=2))]
    models = [
        perturb(*adapt(base, rules, execution="auto", rngs=nnx.Rngs(1))) for base in (quantised(kind), plain(kind))
    ]
    adapter = adapt(plain(kind), rules, rngs=nnx.Rngs(1))[1]
    (found, ours), (expected, theirs) = (loss_and_gradients(model, adapter) for model in models)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(found, plain(kind)(X)) > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine - other)).max() <= 1e-4 * np.abs(other).max() + 1e-5


@pytest.mark.parametrize("execution", ["dense", "fft"])
def test_the_term_of_an_adapter_is_not_quantised(execution):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    base = qwix.quantize_model(Layer(nnx.Rngs(0)), qwix.PtqProvider([rule]), X)
    model, adapter = adapt(base, [Rule("linear", LoRA(rank=2))], execution=execution, rngs=nnx.Rngs(1))
    model = perturb(model, adapter)
    term = X @ model.linear.delta["default"].change(jnp.zeros((8, 8)))
    assert relative_error(model(X) - base(X), term) < 1e-5


@pytest.mark.parametrize("kind", TYPES)
def test_saving_loading_and_checking(kind, tmp_path):
    rules = [Rule("body/(linear|einsum)", DoRA(rank=2)), Rule("body/out", BottleneckBranch(waist=2))]
    model, adapter = adapt(quantised(kind), rules, example=X, rngs=nnx.Rngs(1))
    assert same_bits(model(X), quantised(kind)(X))
    model = perturb(model, adapter)
    check(model, adapter, X)
    save_adapter(tmp_path / "adapter", model, adapter)
    loaded, _ = load_adapter(tmp_path / "adapter", quantised(kind))
    assert same_bits(loaded(X), model(X)) and relative_error(model(X), quantised(kind)(X)) > 1e-3


def test_what_is_refused():
    model, _ = adapt(quantised("int8"), RULES, rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="body/einsum cannot be merged: its kernel is quantised"):
        merge(model)
    with pytest.raises(UserError, match="qvalue cannot be trained: it holds int8"):
        adapt(quantised("int8"), RULES, train=["body/out/.*"], rngs=nnx.Rngs(1))
    rule = qwix.QuantizationRule(module_path="body/.*", weight_qtype="int8")
    for rules in (RULES, [Rule("body", BottleneckBranch(waist=2))]):
        with pytest.raises(UserError, match=r"call qwix.quantize_model first, then adapt"):
            qwix.quantize_model(adapt(Model(nnx.Rngs(0)), rules, rngs=nnx.Rngs(1))[0], qwix.PtqProvider([rule]), X)


def test_a_quantised_layer_as_the_whole_model():
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8")
    base = qwix.quantize_model(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), qwix.PtqProvider([rule]), X)
    model, adapter = adapt(base, [Rule("", LoRA(rank=2))], rngs=nnx.Rngs(1))
    assert same_bits(model(X), base(X))
    model = perturb(model, adapter)
    term = X @ (model.delta["default"].change(jnp.zeros((8, 8))))
    assert relative_error(model(X), base(X) + term) < 1e-5
