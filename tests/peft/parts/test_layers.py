import concurrent.futures
import multiprocessing
import pickle
import threading
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp

from surm_jax.peft import CirculantBranch, CirculantUpdate, DoRA, LoRA, Place, Rule, adapt
from surm_jax.peft.kernels import AdaptedLayer
from surm_jax.peft.parts import layers
from surm_jax.peft.parts.base import original_class
from surm_jax.peft.parts.layers import BranchedModule, attach, detach
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


class Meta(type(nnx.Module)):
    """A metaclass as a user may write it."""


class Own(nnx.Linear, metaclass=Meta):
    """A layer as a user may write it."""


class Small(nnx.Module):
    def __init__(self):
        self.lin, self.own = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), Own(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.own(self.lin(x))


def small(method=None, model=None):
    rules = [Rule("lin|own", method or CirculantUpdate()), Rule("", CirculantBranch())]
    return adapt(model or Small(), rules, rngs=nnx.Rngs(1))[0]


X = jnp.arange(8.0).reshape(2, 4)


def local_model():
    class Local(nnx.Linear):
        """A class inside a function, which only cloudpickle can store."""

    model = Small()
    model.own = Local(4, 4, rngs=nnx.Rngs(1))
    return small(model=model)


@pytest.mark.parametrize("library", ["pickle", "cloudpickle", "copy"])
def test_models_and_graph_definitions_are_pickled_and_copied(library, monkeypatch):
    pickler = pytest.importorskip(library)
    model = local_model() if library == "cloudpickle" else small()
    if library == "copy":
        loaded, graphdef = deepcopy(model), deepcopy(nnx.graphdef(model))
    else:
        stored = pickler.dumps((model, nnx.graphdef(model)))
        if library == "pickle":  # Load it where no class was made before, as in another process.
            monkeypatch.setattr(layers._Made, "known", {})
        loaded, graphdef = pickler.loads(stored)
    assert nnx.graphdef(loaded) == graphdef
    np.testing.assert_array_equal(loaded(X), model(X))
    if library != "copy":
        fresh = small()
        assert type(loaded.lin) is type(fresh.lin) and type(loaded) is type(fresh)
    detach(loaded.own, "default")
    assert type(loaded.own) is original_class(model.own)


def computed(stored):
    """Compute the outputs of a model and of the merged model in another process, and return them."""
    model, graphdef, state = pickle.loads(stored)
    fresh = small()
    assert type(model) is type(fresh) and type(model.lin) is type(fresh.lin)
    own = adapt(original_class(model.own)(4, 4, rngs=nnx.Rngs(0)), [Rule("", LoRA())], rngs=nnx.Rngs(1))[0]
    assert type(own) is type(model.own)
    return np.asarray(model(X)), np.asarray(nnx.merge(graphdef, state)(X))


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", ["pickle", "cloudpickle"])
def test_another_process_gets_a_model(library):
    pickler, model = pytest.importorskip(library), local_model() if library == "cloudpickle" else small()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for output in pool.apply(computed, (pickler.dumps((model, *nnx.split(model))),)):
            np.testing.assert_allclose(output, model(X), rtol=1e-6)


@pytest.mark.parametrize("method", [CirculantUpdate(), DoRA(), CirculantUpdate(dropout=0.5)], ids=lambda m: m.name)
def test_models_are_tabulated_and_displayed(method, capsys):
    model, plain = small(method), nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    before = model(X), plain(X)
    table = nnx.tabulate(model, X, console_kwargs={"width": 200})
    assert all(name in table for name in ("BranchedSmall", "AdaptedLinear", "AdaptedOwn", "delta/default", "Adapter"))
    nnx.display(model)
    assert "delta=" in capsys.readouterr().out
    for old, new in zip(before, (model(X), plain(X)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_threads_make_one_class():
    """Check that eight threads can adapt and call layers of one class, which was never adapted before, at once."""
    for _ in range(20):
        cls = type("Fresh", (nnx.Linear,), {})
        base, barrier = cls(4, 4, rngs=nnx.Rngs(0)), threading.Barrier(8)

        def work(base=base, barrier=barrier):
            barrier.wait()
            layer = nnx.clone(base)
            attach(layer, "default", LoRA().make_part(Place(4, layer.kernel[...]), jax.random.key(0)))
            return type(layer), np.asarray(layer(X))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(work) for _ in range(8)]]
        assert len({kind for kind, _ in found}) == 1
        assert all(np.array_equal(output, found[0][1]) for _, output in found)


def test_orbax_keeps_the_state(tmp_path):
    model = small()
    model.lin.delta["default"].r1[...] = jnp.arange(4.0)
    ocp.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(model)))
    loaded = nnx.eval_shape(small)
    abstract = nnx.state(loaded)
    nnx.replace_by_pure_dict(abstract, ocp.load(tmp_path / "state", nnx.to_pure_dict(abstract)))
    np.testing.assert_array_equal(nnx.merge(nnx.graphdef(loaded), abstract)(X), model(X))
