import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from surm_jax.errors import UserError
from surm_jax.peft import ACTIVATIONS, AdapterParam, BottleneckBranch, CirculantBranch, Place, Rule, adapt
from tests.peft.cases import BRANCHES, is_quick
from tests.peft.models import base, by_path, inputs, materialize, perturb, relative_error, same_bits
from tests.peft.oracles import circulant, gelu
from tests.speeds import fast

X = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)


def branch_of(method, width=8):
    """Return a branch with random numbers in all arrays."""
    branch = method.make_part(Place(width), jax.random.key(0))
    rng = np.random.default_rng(1)
    for variable in branch.tensors().values():
        variable[...] = jnp.asarray(0.5 * rng.normal(size=variable.shape), jnp.float32)
    return branch


def test_the_adapter_of_the_paper_by_default():
    """Compare with `X + gelu(X C) + b`, with the exact gelu, which uses erf (arXiv 2406.17740, section 4.2)."""
    branch = branch_of(CirculantBranch())
    C = circulant(np.asarray(branch.down.r1[...] * branch.down.r2[...], np.float64), 8, 8)
    assert (
        relative_error(branch.added(jnp.asarray(X)), gelu(X.astype(np.float64) @ C) + np.asarray(branch.bias[...]))
        < 1e-5
    )


def test_the_adapter_of_houlsby_by_default():
    """Compare with `X + gelu(X D + d) U + b` (arXiv 1902.00751)."""
    branch = branch_of(BottleneckBranch(waist=3))
    D, d, U, b = (np.asarray(v[...], np.float64) for v in (branch.down.W, branch.down_bias, branch.up.W, branch.bias))
    assert (D.shape, d.shape, U.shape, b.shape) == ((8, 3), (3,), (3, 8), (8,))
    assert relative_error(branch.added(jnp.asarray(X)), gelu(X.astype(np.float64) @ D + d) @ U + b) < 1e-5


@pytest.mark.parametrize("name", fast(BRANCHES, where=is_quick))
def test_without_biases(name):
    case = BRANCHES[name]
    branch = branch_of(dataclasses.replace(case.method, bias=False))
    arrays = {key: np.asarray(v[...], np.float64) for key, v in branch.tensors().items()}
    assert not [key for key in arrays if "bias" in key]
    assert branch_of(case.method).tensors().keys() - arrays.keys() == {key for key in case.stored(8) if "bias" in key}
    assert relative_error(branch.added(jnp.asarray(X)), case.branch(arrays, X.astype(np.float64))) < 1e-5


@pytest.mark.parametrize("name", fast(BRANCHES, where=is_quick))
def test_what_is_trained_is_float32_and_all_of_it_is_saved(name):
    branch = branch_of(BRANCHES[name].method)
    saved = branch.tensors()
    assert {type(v) for v in saved.values()} == {AdapterParam}
    assert {v.dtype for v in saved.values()} == {np.dtype("float32")}
    assert by_path(nnx.state(branch, AdapterParam)).keys() == saved.keys()


@pytest.mark.parametrize("name", fast(BRANCHES, where=is_quick))
def test_the_output_has_the_dtype_of_the_input(name):
    branch = branch_of(BRANCHES[name].method)
    half = jnp.asarray(X, jnp.bfloat16)
    y = branch.added(half)
    assert y.dtype == jnp.bfloat16
    # Up to five operations each round their result to 8 bits.
    assert relative_error(y, branch.added(half.astype(jnp.float32))) < 5 * 2.0**-8


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_zero(name):
    assert ACTIVATIONS[name](jnp.zeros(3)).tolist() == [0, 0, 0]


def test_relu_is_refused_where_its_slope_at_the_start_would_be_zero():
    with pytest.raises(UserError, match=r"circulant_adapter\.activation=relu would never learn"):
        CirculantBranch(activation="relu")
    assert BottleneckBranch(activation="relu").activation == "relu"


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_every_other_activation_learns_from_the_start(activation):
    method = CirculantBranch(activation=activation)
    branch = method.make_part(Place(8), jax.random.key(0))
    graphdef, trained, rest = nnx.split(branch, AdapterParam, ...)
    slope = jax.grad(lambda trained: jnp.sum(nnx.merge(graphdef, trained, rest).added(jnp.asarray(X))))(trained)
    assert np.abs(slope["down"]["r1"][...]).max() > 1e-3


def test_the_branch_reads_what_the_module_puts_out():
    """Check that every branch gets the module's own output, without what other adapters add to it.

    The `__call__` of the module takes additional arguments.
    """

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x, gain=1.0, *, shift=0.0):
            return gain * self.inner(x) + shift

    module = materialize(lambda: Twice(nnx.Rngs(0)))
    model = module
    for name in ("one", "two"):
        model, adapter = adapt(model, [Rule("", CirculantBranch())], name=name, rngs=nnx.Rngs(1))
        model = perturb(model, adapter)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    y = module(x, 3.0, shift=0.5)
    one, two = (model.branch[name] for name in ("one", "two"))
    np.testing.assert_allclose(model(x, 3.0, shift=0.5), y + one.added(y) + two.added(y), rtol=1e-6)
    assert isinstance(model, Twice) and type(model).__name__ == "BranchedTwice"


@pytest.mark.parametrize("name", ["circulant_adapter", "bottleneck"])
def test_tree_mode(name):
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        original = nnx.clone(base("mlp"))
        model, adapter = adapt(original, [BRANCHES[name].rule("mlp")], rngs=nnx.Rngs(1))
        assert same_bits(model(inputs("mlp")), original(inputs("mlp")))
        assert relative_error(perturb(model, adapter)(inputs("mlp")), original(inputs("mlp"))) > 0.02
