import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.peft import CirculantBranch, LoRA, Place
from surm_jax.peft.parts.base import original_class
from surm_jax.peft.parts.layers import AdaptedLayer, BranchedModule, attach, detach
from tests.peft.models import Gated, base


def delta_for(layer):
    kernel = layer.kernel[...].reshape(6, -1)
    return LoRA().make_part(Place(kernel.shape[1], kernel), jax.random.key(0))


def branch_of(width):
    return CirculantBranch().make_part(Place(width), jax.random.key(0))


LAYERS = {
    "Linear": lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0)),
    "LinearGeneral": lambda: nnx.LinearGeneral(6, (2, 3), rngs=nnx.Rngs(0)),
    "Gated": lambda: Gated(6, 4, rngs=nnx.Rngs(0)),
    "LoRALinear": lambda: nnx.LoRALinear(6, 4, lora_rank=1, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attach_keeps_the_class_above_and_detach_brings_it_back(name):
    layer, plain = LAYERS[name](), LAYERS[name]()
    attach(layer, "default", delta_for(layer))
    assert isinstance(layer, type(plain)) and isinstance(layer, AdaptedLayer)
    assert type(layer).__name__ == f"Adapted{name}" and original_class(layer) is type(plain)
    assert (layer.in_features, layer.out_features) == (plain.in_features, plain.out_features)
    detach(layer, "default")
    assert type(layer) is type(plain) is original_class(layer)
    assert nnx.graphdef(layer) == nnx.graphdef(plain)


@pytest.mark.parametrize("order", [("delta", "branch"), ("branch", "delta")])
def test_both_slots_in_any_order(order):
    layer, plain = LAYERS["Linear"](), LAYERS["Linear"]()
    parts = {"delta": delta_for(layer), "branch": branch_of(4)}
    for slot in order:
        attach(layer, slot, parts[slot])
    assert isinstance(layer, nnx.Linear) and isinstance(layer, AdaptedLayer) and isinstance(layer, BranchedModule)
    assert type(layer).__name__ == "BranchedAdaptedLinear"
    for first in order:
        one = nnx.clone(layer)
        detach(one, first)
        assert type(one).__name__ == {"delta": "BranchedLinear", "branch": "AdaptedLinear"}[first]
        detach(one, {"delta": "branch", "branch": "delta"}[first])
        assert nnx.graphdef(one) == nnx.graphdef(plain)


def test_two_names_in_one_slot():
    layer, plain = LAYERS["Linear"](), LAYERS["Linear"]()
    for name in ("one", "two"):
        attach(layer, name, delta_for(layer))
    detach(layer, "one")
    assert type(layer).__name__ == "AdaptedLinear" and list(layer.delta) == ["two"]
    detach(layer, "none of that name")
    assert list(layer.delta) == ["two"]
    detach(layer, "two")
    assert nnx.graphdef(layer) == nnx.graphdef(plain)


def test_two_layers_of_a_class_share_the_adapted_class():
    layers = [LAYERS["Linear"](), LAYERS["Linear"]()]
    for layer in layers:
        attach(layer, "default", delta_for(layer))
    assert type(layers[0]) is type(layers[1])


@pytest.mark.parametrize("part", ["delta", "branch"])
def test_the_class_survives_splitting_and_copying(part):
    layer = LAYERS["Linear"]()
    attach(layer, "default", delta_for(layer) if part == "delta" else branch_of(4))
    for copy in (nnx.clone(layer), nnx.merge(*nnx.split(layer))):
        assert type(copy) is type(layer)
        np.testing.assert_array_equal(copy(jnp.ones((2, 6))), layer(jnp.ones((2, 6))))


def test_any_module_can_have_a_branch():
    model = nnx.clone(base("attention"))
    plain = model(jnp.ones((1, 3, 6)))
    attach(model, "default", branch_of(4))
    assert isinstance(model, nnx.MultiHeadAttention) and type(model).__name__ == "BranchedMultiHeadAttention"
    model.branch["default"].bias[...] = jnp.arange(4.0)
    np.testing.assert_allclose(model(jnp.ones((1, 3, 6))), np.asarray(plain) + np.arange(4.0), rtol=1e-6)
    detach(model, "default")
    assert nnx.graphdef(model) == nnx.graphdef(base("attention"))
